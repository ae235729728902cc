from __future__ import annotations

from dataclasses import dataclass

from dsasr.utils.field_comments import field_comments


@dataclass
class Example:
    """A class."""

    plain: int
    beside: int = 1  # at the end of the line
    # above the field,
    # on two lines
    above: str = "# no comment"
    below: float = 0.5
    """Below the field,
    on two lines."""
    # replaced by the comment beside it
    both: tuple[int, ...] = (1, 2)  # beside wins

    def method(self):
        """No field."""
        # nor a comment of one
        inside: int = 1  # not a field
        return inside


def test_comments_beside_above_and_below_a_field():
    assert field_comments(Example) == {
        "plain": "",
        "beside": "at the end of the line",
        "above": "above the field, on two lines",
        "below": "Below the field, on two lines.",
        "both": "beside wins",
    }
