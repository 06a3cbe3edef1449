// The page at "/": asks for a picture without waiting on the connection, then follows the job.
"use strict";

const POLL_MS = 250;
const EXAMPLES = [
  "a red circle above a blue square",
  "a small green triangle to the left of a large yellow circle",
  "a purple star",
];
const TIMING_NAMES = {
  queue_s: "queue", encode_s: "encode", denoise_s: "denoise",
  decode_s: "decode", store_s: "store", total_s: "total",
};
const TERMINAL = new Set(["succeeded", "failed", "canceled", "expired"]);

const $ = (id) => document.getElementById(id);
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

let running = null; // id of the job being followed
let lastSeed = null;

/** Calls the API; resolves to its JSON and throws its problem as an Error in words. */
async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The server cannot be reached.");
  }
  const body = await response.json().catch(() => ({}));
  if (response.ok) return body;
  const error = new Error(body.detail || `The server answered ${response.status}.`);
  error.code = body.code;
  error.field = body.errors?.[0]?.field;
  error.retryAfter = Number(response.headers.get("retry-after")) || null;
  throw error;
}

function show(id, visible) { $(id).hidden = !visible; }

function setStatus(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

/** Learns the model's limits and defaults; keeps asking while no worker has loaded one. */
async function learnModel() {
  for (;;) {
    try {
      const offer = await call("/presets");
      applyOffer(offer);
      return;
    } catch (error) {
      $("model").textContent =
        error.code === "model-not-ready" ? "the model is still loading…" : error.message;
      await sleep(1000);
    }
  }
}

function applyOffer(offer) {
  const { limits, defaults } = offer;
  $("model").textContent = offer.model;
  for (const side of ["width", "height"]) {
    Object.assign($(side), {
      min: limits.min_size, max: limits.max_size, step: limits.size_multiple,
    });
    $(side).placeholder = defaults[side] ?? "";
    if (!$(side).value && defaults[side]) $(side).value = defaults[side];
  }
  $("steps").max = limits.max_steps;
  $("steps").placeholder = defaults.num_inference_steps ?? "";
  for (const name of Object.keys(offer.presets)) {
    $("preset").add(new Option(name, name));
  }
  show("preset-field", Object.keys(offer.presets).length > 0);
}

/** The request body of what the form says; empty fields stay with the server's defaults. */
function formBody() {
  const body = { prompt: $("prompt").value };
  const numbers = { width: "width", height: "height", steps: "num_inference_steps", seed: "seed" };
  for (const [id, name] of Object.entries(numbers)) {
    if ($(id).value !== "") body[name] = Number($(id).value);
  }
  if ($("preset").value) body.preset = $("preset").value;
  return body;
}

function describe(job) {
  if (job.status === "queued") {
    return job.position > 1 ? `Waiting, ${job.position - 1} ahead…` : "Waiting for a worker…";
  }
  const again = job.attempt > 1 ? ` (attempt ${job.attempt})` : "";
  return job.total ? `Step ${job.step} of ${job.total}${again}` : `Preparing…${again}`;
}

function addFact(name, value) {
  const term = document.createElement("dt");
  const text = document.createElement("dd");
  term.textContent = name;
  text.textContent = value;
  $("facts").append(term, text);
}

function showFacts(job) {
  $("facts").replaceChildren();
  addFact("seed", job.images[0].seed);
  addFact("size", `${job.images[0].width} × ${job.images[0].height}`);
  addFact("model", job.model);
  if (job.steps?.computed !== undefined) addFact("steps", job.steps.computed);
  const timings = Object.entries(TIMING_NAMES)
    .filter(([key]) => typeof job.timings?.[key] === "number")
    .map(([key, name]) => `${name} ${job.timings[key].toFixed(2)} s`);
  if (timings.length) addFact("time", timings.join(" · "));
  addFact("job", job.id);
  show("facts", true);
}

function showPicture(job) {
  const image = job.images[0];
  lastSeed = image.seed;
  $("picture").src = image.url;
  $("picture").alt = $("prompt").value;
  $("open").href = image.url;
  $("save").href = image.url;
  $("save").download = ""; // the server names the file
  show("picture", true);
  show("hint", false);
  show("links", true);
  $("frame").classList.remove("empty");
}

function showEnd(job) {
  $("warnings").replaceChildren(
    ...job.warnings.map((text) => Object.assign(document.createElement("li"), { textContent: text })),
  );
  show("warnings", job.warnings.length > 0);
  if (job.status === "succeeded") {
    showPicture(job);
    showFacts(job);
    setStatus(`Done in ${job.timings?.total_s?.toFixed(1) ?? "?"} s.`);
  } else if (job.status === "canceled") {
    setStatus("Canceled.");
  } else {
    setStatus(job.error?.detail ?? `The job ended as ${job.status}.`, true);
  }
}

/** Follows one job to its end; a short outage of the server is waited out. */
async function follow(id) {
  let misses = 0;
  for (;;) {
    try {
      const job = await call(`/jobs/${id}`);
      misses = 0;
      if (TERMINAL.has(job.status)) return showEnd(job);
      setStatus(describe(job));
      $("bar").max = job.total || 1;
      if (job.total) $("bar").value = job.step;
      else $("bar").removeAttribute("value");
    } catch (error) {
      if (error.code === "not-found" || ++misses > 40) throw error;
      setStatus(`${error.message} Trying again…`);
    }
    await sleep(misses ? 1000 : POLL_MS);
  }
}

function setBusy(busy) {
  $("generate").disabled = busy;
  show("cancel", busy);
  show("bar", busy);
  $("frame").classList.toggle("busy", busy);
}

async function generate(event) {
  event.preventDefault();
  if (running) return;
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
  running = "submitting";
  setBusy(true);
  show("warnings", false);
  setStatus("Sending…");
  try {
    const job = await call("/generate", {
      method: "POST",
      headers: { "content-type": "application/json", prefer: "respond-async" },
      body: JSON.stringify(formBody()),
    });
    running = job.id;
    await follow(job.id);
  } catch (error) {
    const field = $(error.field === "num_inference_steps" ? "steps" : error.field ?? "");
    field?.setAttribute("aria-invalid", "true");
    const retry = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
    setStatus(error.message + retry, true);
  } finally {
    running = null;
    setBusy(false);
  }
}

async function cancel() {
  if (!running || running === "submitting") return;
  setStatus("Canceling…");
  await call(`/jobs/${running}/cancel`, { method: "POST" }).catch((error) => {
    setStatus(error.message, true);
  });
}

function addExamples() {
  for (const text of EXAMPLES) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
    button.addEventListener("click", () => { $("prompt").value = text; $("prompt").focus(); });
    $("examples").append(button);
  }
}

addExamples();
$("form").addEventListener("submit", generate);
$("cancel").addEventListener("click", cancel);
$("reuse").addEventListener("click", () => { $("seed").value = lastSeed; });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
learnModel();
