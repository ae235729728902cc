// Collects the microphone's samples in pieces of 100 ms.
class Capture extends AudioWorkletProcessor {
  constructor() {
    super();
    this.piece = new Int16Array(1600);
    this.filled = 0;
  }

  process(inputs) {
    for (const sample of inputs[0][0] || []) {
      this.piece[this.filled++] = Math.max(-32768, Math.min(32767, Math.round(sample * 32768)));
      if (this.filled === this.piece.length) {
        this.port.postMessage(this.piece.slice().buffer);
        this.filled = 0;
      }
    }
    return true;
  }
}

registerProcessor("capture", Capture);
