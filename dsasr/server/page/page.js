const element = (id) => document.getElementById(id);
const button = element("microphone");
let running = null; // {context, media, socket, ending} while the microphone is on

function say(text) {
  element("state").textContent = text;
}

function addLine(text, seconds, isError = false) {
  const line = document.createElement("li");
  if (seconds !== null) {
    const time = document.createElement("time");
    const whole = Math.floor(seconds);
    time.textContent = `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
    line.append(time);
  }
  if (isError) line.className = "error";
  line.append(text);
  element("finals").append(line);
}

function showPartial(text, settled) {
  const characters = Array.from(text); // as the server counts them
  element("settled").textContent = characters.slice(0, settled).join("");
  element("open").textContent = characters.slice(settled).join("");
}

function onMessage(event) {
  const message = JSON.parse(event.data);
  if (message.type === "partial") showPartial(message.text, message.settled);
  if (message.type === "final") {
    showPartial("", 0);
    if (message.text) addLine(message.text, message.start);
  }
  if (message.type === "warning") say(message.message);
  if (message.type === "error") addLine(message.message, null, true);
}

async function start() {
  say("opening the microphone …");
  const media = await navigator.mediaDevices.getUserMedia({
    audio: { channelCount: 1, echoCancellation: false, noiseSuppression: false },
  });
  const context = new AudioContext({ sampleRate: 16000 }); // the browser resamples
  await context.audioWorklet.addModule("page/capture.js");
  const scheme = location.protocol === "https:" ? "wss" : "ws";
  const socket = new WebSocket(`${scheme}://${location.host}/v1/audio/stream?rate=16000`);
  socket.binaryType = "arraybuffer";
  socket.onmessage = onMessage;
  socket.onclose = () => stop("the stream has ended");
  await new Promise((resolve, reject) => {
    socket.onopen = resolve;
    socket.onerror = () => reject(new Error("the server cannot be reached"));
  });
  running = { context, media, socket, ending: false };
  const capture = new AudioWorkletNode(context, "capture", { numberOfOutputs: 0 });
  capture.port.onmessage = ({ data }) => {
    if (socket.readyState === WebSocket.OPEN && running && !running.ending) socket.send(data);
  };
  context.createMediaStreamSource(media).connect(capture);
  button.textContent = "Stop";
  button.setAttribute("aria-pressed", "true");
  say("listening");
}

function finish() {
  running.ending = true; // the last texts still come
  running.media.getTracks().forEach((track) => track.stop());
  running.socket.send(JSON.stringify({ type: "finish" }));
  say("finishing …");
}

function stop(text) {
  if (!running) return;
  running.media.getTracks().forEach((track) => track.stop());
  running.context.close();
  running = null;
  button.textContent = "Start microphone";
  button.setAttribute("aria-pressed", "false");
  say(text);
}

button.addEventListener("click", async () => {
  if (running) {
    if (!running.ending) finish();
    return;
  }
  button.disabled = true;
  try {
    await start();
  } catch (error) {
    say(`no microphone: ${error.message}`);
  }
  button.disabled = false;
});

async function transcribe(file) {
  say(`transcribing ${file.name} …`);
  const form = new FormData();
  form.append("file", file);
  form.append("response_format", "verbose_json");
  try {
    const response = await fetch("v1/audio/transcriptions", { method: "POST", body: form });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error.message);
    for (const segment of answer.segments) {
      if (segment.text && !segment.no_speech) addLine(segment.text, segment.start);
    }
    say(`${file.name}: ${answer.duration.toFixed(1)} s`);
  } catch (error) {
    addLine(`${file.name}: ${error.message}`, null, true);
    say("");
  }
}

const drop = element("drop");
const input = element("file");
drop.addEventListener("click", () => input.click());
drop.addEventListener("keydown", (event) => {
  if (event.key === "Enter" || event.key === " ") input.click();
});
drop.addEventListener("dragover", (event) => {
  event.preventDefault();
  drop.classList.add("over");
});
drop.addEventListener("dragleave", () => drop.classList.remove("over"));
drop.addEventListener("drop", async (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  for (const file of event.dataTransfer.files) await transcribe(file);
});
input.addEventListener("change", async () => {
  for (const file of input.files) await transcribe(file);
  input.value = "";
});
