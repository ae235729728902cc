// A click on a head of a table sorts its rows; a second one reverses their order.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  heads.forEach((head, column) => {
    const value = (row) => {
      const cell = row.cells[column];
      return cell.dataset.sort ?? cell.textContent.trim().replaceAll(",", "");
    };
    const sort = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows];
      const known = rows.filter((row) => value(row) !== "–");
      const numeric = known.every((row) => value(row) !== "" && !isNaN(value(row)));
      known.sort((a, b) => (numeric ? value(a) - value(b) : value(a).localeCompare(value(b))));
      if (down) known.reverse();
      table.tBodies[0].append(...known, ...rows.filter((row) => value(row) === "–"));
    };
    head.querySelector("button").addEventListener("click", sort);
  });
}
