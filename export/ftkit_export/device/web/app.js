// Runs BUNDLE/model.onnx in this page. The golden vectors come first: what fails them answers nothing.
// Served from BUNDLE/device/web, so that ../.. is the bundle; model.json says what the file's own metadata say.

const bundle = new URL("../..", document.baseURI);
const at = (id) => document.getElementById(id);
const read = async (path, how) => {
  const answer = await fetch(new URL(path, bundle));
  if (!answer.ok) throw new Error(`${path}: expected a file of the bundle, found status ${answer.status}`);
  return answer[how]();
};

const OUTPUTS = { "single-label": "classes", "multi-label": "labels", regression: "quantities" };
let session, ort, model, familiar, busy = false, stream = null;

function half(bits) { // IEEE 754 binary16 -> number
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

function unpacked(item) { // {shape, dtype, base64} -> rows of numbers
  const bytes = Uint8Array.from(atob(item.base64), (letter) => letter.charCodeAt(0));
  const values = item.dtype === "float16"
    ? Float64Array.from(new Uint16Array(bytes.buffer), half) : new Float32Array(bytes.buffer);
  const width = item.shape.at(-1);
  return Array.from({ length: item.shape.length > 1 ? item.shape[0] : 1 },
    (_, row) => values.subarray(row * width, (row + 1) * width));
}

const dot = (a, b) => { let sum = 0; for (let i = 0; i < a.length; i++) sum += a[i] * b[i]; return sum; };

function foreignness(embedding) { // as ftkit_export.runtime.out_of_distribution: squared distance to the nearest class mean
  const length = Math.max(Math.sqrt(dot(embedding, embedding)), 1e-12);
  const unit = Float64Array.from(embedding, (value) => value / length);
  const distances = familiar.means.map((mean, number) => {
    const apart = unit.map((value, i) => value - mean[i]);
    let found = dot(apart, apart) / familiar.rest;
    familiar.directions.forEach((axis, k) => { found -= familiar.weights[k] * dot(apart, axis) ** 2; });
    return found / (familiar.spreads?.[number] ?? 1); // a class that was enrolled has its own
  });
  return Math.min(...distances) / embedding.length;
}

const valued = () => model.readout.task === "regression";

async function run(frame, shape) {
  const begun = performance.now();
  const found = await session.run({ image: new ort.Tensor("uint8", frame, [1, ...shape]) });
  const answer = { answers: found[valued() ? "values" : "probabilities"].data, embedding: found.embedding.data };
  return { ...answer, ms: performance.now() - begun };
}

async function replay() { // golden/raw, as ftkit_export.proof.golden wrote it
  const [head, ...lines] = (await read("golden/raw/index.txt", "text")).trim().split("\n").map((line) => line.split(" "));
  const [count, classes, , channels] = head.map(Number);
  const expected = new Float32Array(await read("golden/raw/probabilities.f32", "arrayBuffer"));
  let worst = 0, failed = 0;
  for (let i = 0; i < count; i++) {
    const [file, rows, columns, limit] = lines[i];
    const frame = new Uint8Array(await read(`golden/raw/${file}`, "arrayBuffer"));
    const { answers } = await run(frame, [Number(rows), Number(columns), channels]);
    let apart = 0;
    for (let j = 0; j < classes; j++) {
      const gap = Math.abs(answers[j] - expected[i * classes + j]) / (valued() ? model.readout.spreads[j] : 1);
      apart = Number.isNaN(apart) || gap <= apart ? apart : gap; // NaN stays
    }
    if (!(apart <= Number(limit))) failed++;
    worst = Math.max(worst, Number.isNaN(apart) ? Infinity : apart / Number(limit));
  }
  return { count, failed, worst };
}

async function open(provider) {
  ort = await import(provider === "webgpu" ? "./ort.webgpu.min.mjs" : "./ort.wasm.min.mjs");
  ort.env.wasm.wasmPaths = new URL("./", document.baseURI).href;
  ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  ort.env.logLevel = "error";
  const bytes = await read("model.onnx", "arrayBuffer"), begun = performance.now();
  session = await ort.InferenceSession.create(bytes, { executionProviders: [provider] });
  const found = await replay();
  const threads = provider === "wasm" ? `, ${ort.env.wasm.numThreads} thread${ort.env.wasm.numThreads > 1 ? "s" : ""}` : "";
  return { ...found, provider, said: `${provider}${threads}; ready in ${Math.round(performance.now() - begun)} ms` };
}

async function start() {
  model = await (await fetch("model.json")).json();
  familiar = model.out_of_domain && {
    ...model.out_of_domain, means: unpacked(model.out_of_domain.means),
    directions: model.out_of_domain.directions.shape[0] ? unpacked(model.out_of_domain.directions) : [],
    weights: unpacked(model.out_of_domain.weights)[0],
    spreads: model.out_of_domain.spreads && unpacked(model.out_of_domain.spreads)[0],
  };
  at("title").textContent = `${model.name}: ${model.labels.length} ${OUTPUTS[model.readout.task]}`;
  const tried = navigator.gpu && (await navigator.gpu.requestAdapter()) ? ["webgpu", "wasm"] : ["wasm"];
  let found, why = "";
  for (const provider of tried) {
    try {
      found = await open(provider);
      if (!found.failed) break;
      why = `${provider} failed ${found.failed} golden vectors. `;
    } catch (error) {
      if (provider === tried.at(-1)) throw error;
      why = `${provider}: ${error.message}. `;
    }
  }
  at("engine").textContent = `${why}ONNX Runtime Web ${ort.env.versions.web} on ${found.said}`;
  at("parity").textContent = found.failed
    ? `${found.failed} of ${found.count} golden vectors FAILED: this browser does not compute what was exported.`
    : `${found.count} golden vectors passed, worst at ${found.worst.toFixed(2)} of its tolerance.`;
  at("parity").className = found.failed ? "bad" : "good";
  if (found.failed) return;
  if (model.input_format === "nv12") {
    at("verdict").textContent = "This model takes NV12 camera frames: a photograph cannot be tried here.";
    return;
  }
  at("controls").className = "";
  at("file").disabled = false;
  at("camera").disabled = !navigator.mediaDevices;
  samples();
}

async function samples() {
  const entries = (await read("golden/golden.json", "json")).images;
  for (const { file } of entries.filter((entry) => entry.group === "photographs").slice(0, 8)) {
    const button = document.createElement("button"), image = document.createElement("img");
    image.src = new URL(`golden/${file}`, bundle);
    image.alt = `golden image ${file}`;
    button.append(image);
    button.onclick = async () => classify(await (await fetch(image.src)).blob());
    at("samples").append(button);
  }
}

function frameOf(rgba) { // canvas pixels -> the frame the model takes, and its channels
  const count = rgba.length / 4;
  if (model.input_format === "grey") {
    const grey = new Uint8Array(count); // Pillow's own integer weights
    for (let i = 0; i < count; i++) {
      grey[i] = (rgba[4 * i] * 19595 + rgba[4 * i + 1] * 38470 + rgba[4 * i + 2] * 7471 + 0x8000) >> 16;
    }
    return [grey, 1];
  }
  const frame = new Uint8Array(count * 3), first = model.input_format === "bgr" ? 2 : 0;
  for (let i = 0; i < count; i++) {
    frame[3 * i] = rgba[4 * i + first];
    frame[3 * i + 1] = rgba[4 * i + 1];
    frame[3 * i + 2] = rgba[4 * i + 2 - first];
  }
  return [frame, 3];
}

async function answer(source, width, height) {
  const canvas = at("place").querySelector("canvas") || document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white"; // transparency lies over white, as everywhere in ftkit
  context.fillRect(0, 0, width, height);
  context.drawImage(source, 0, 0);
  at("place").replaceChildren(canvas);
  const [frame, channels] = frameOf(context.getImageData(0, 0, width, height).data);
  show(await run(frame, [height, width, channels]), width, height);
}

async function classify(blob) {
  if (stream) camera(); // off: a file is what is wanted now
  while (busy) await new Promise((go) => setTimeout(go, 20));
  busy = true;
  try {
    const image = await createImageBitmap(blob, { colorSpaceConversion: "none", imageOrientation: "from-image" });
    await answer(image, image.width, image.height);
  } catch (error) {
    at("verdict").textContent = `expected an image this browser can read, found: ${error.message}`;
    at("verdict").className = "bad";
    at("bars").replaceChildren();
    at("latency").textContent = "";
  }
  busy = false;
}

function show({ answers, embedding, ms }, width, height) {
  const strange = familiar && foreignness(embedding) > familiar.threshold;
  const { said, label, doubtful, bars } = READ[model.readout.task](answers);
  const remark = strange ? " – foreign: unlike the images it was trained on"
    : doubtful ? ` – doubtful: below ${model.abstain_threshold.toFixed(2)}` : "";
  at("verdict").textContent = `${said}${remark}`;
  at("verdict").className = remark ? "warn" : "good";
  at("verdict").dataset.label = label;
  at("verdict").dataset.remark = strange ? "foreign" : doubtful ? "doubtful" : "";
  at("bars").replaceChildren(...bars.slice(0, MOST_BARS).map(([name, share]) => {
    const item = document.createElement("li"), track = document.createElement("div"), fill = document.createElement("div");
    const value = document.createElement("span");
    value.textContent = share.toFixed(3);
    track.className = "track";
    fill.className = "fill";
    fill.style.width = `${100 * share}%`;
    track.append(fill);
    item.append(value, name, track);
    return item;
  }));
  at("latency").textContent = `${ms.toFixed(1)} ms for ${width} x ${height} pixels, preprocessing included`;
}

const MOST_BARS = 10;
const byValue = (answers) => [...answers.keys()].sort((a, b) => answers[b] - answers[a]);
const shares = (answers) => byValue(answers).map((place) => [model.labels[place], answers[place]]);
const READ = { // by task: what is said, its name alone, and a bar for each share
  "single-label": (answers) => {
    const best = byValue(answers)[0], top = answers[best];
    return { said: `${model.labels[best]} ${top.toFixed(3)}`, label: model.labels[best],
      doubtful: top < model.abstain_threshold, bars: shares(answers) };
  },
  "multi-label": (answers) => {
    const apply = model.labels.map((_, place) => place).filter((place) => answers[place] >= model.readout.thresholds[place]);
    return { said: apply.map((place) => `${model.labels[place]} ${answers[place].toFixed(3)}`).join(", ") || "none",
      label: apply.map((place) => model.labels[place]).join(", "), bars: shares(answers) };
  },
  regression: (answers) => {
    const { margins, units, share } = model.readout, short = (value) => String(Number(value.toPrecision(4)));
    const each = model.labels.map((name, place) => `${name} ${short(answers[place])} `
      + `[${short(answers[place] - margins[place])}, ${short(answers[place] + margins[place])}] ${units[place]}`.trim());
    return { said: `${each.join(", ")} (in brackets: what holds ${Math.round(100 * share)} % of the true values)`,
      label: model.labels.join(", "), bars: [] };
  },
};

async function camera() {
  if (stream) {
    stream.getTracks().forEach((track) => track.stop());
    stream = null;
    at("camera").textContent = "Use the camera";
    return;
  }
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    at("verdict").textContent = `expected a camera, found: ${error.message}`;
    at("verdict").className = "bad";
    return;
  }
  at("camera").textContent = "Stop the camera";
  const video = document.createElement("video");
  video.srcObject = stream;
  video.muted = video.playsInline = true;
  await video.play();
  const own = stream;
  const step = async () => {
    if (stream !== own) return;
    if (!busy) {
      busy = true;
      try {
        await answer(video, video.videoWidth, video.videoHeight);
      } catch (error) {
        if (stream === own) camera(); // off
        at("verdict").textContent = `expected the camera's picture to be answered, found: ${error.message}`;
        at("verdict").className = "bad";
      }
      busy = false;
    }
    requestAnimationFrame(step);
  };
  step();
}

at("file").onchange = () => at("file").files[0] && classify(at("file").files[0]);
at("camera").onclick = camera;
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    at("place").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && !at("file").disabled && event.dataTransfer.files[0]) classify(event.dataTransfer.files[0]);
  });
}

start().catch((error) => {
  at("title").textContent = "The model did not load";
  at("engine").textContent = error.message;
  at("engine").className = "bad";
});
