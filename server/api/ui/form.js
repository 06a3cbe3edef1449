// The settings: from the form to the body of a request and back. An empty field is left out, so
// that preset and checkpoint decide; its placeholder says what that comes to.
import { $, choose, chosen, el, show } from "./dom.js";
import { loraValues, offerLoras, setLoras } from "./loras.js";
import { fallback } from "./offer.js";
import { offerSizes, showRatio } from "./sizes.js";

const NUMBERS = ["width", "height", "num_inference_steps", "guidance_scale", "seed", "shift", "quality"];
const TEXTS = ["prompt", "negative_prompt", "preset", "sampler", "output_format"];
const MORE = ["negative_prompt", "system_prompt", "panel", "sampler", "shift", "output_format", "quality", "loras"];
const OWN = "own text";

let templates = [];

/** Fits the form to what the model offers; settings already made stay. */
export function offerSettings({ limits, presets, templates: names, loras }) {
  const before = readSettings();
  templates = names;
  $("preset").replaceChildren(new Option("none", ""), ...Object.keys(presets).map((name) => new Option(name)));
  $("template").replaceChildren(
    new Option("default", ""), ...names.map((name) => new Option(name)), new Option(OWN),
  );
  const numbers = Array.from({ length: limits.max_images }, (_, index) => new Option(`${index + 1}`));
  $("num_images").replaceChildren(...numbers);
  Object.assign($("num_inference_steps"), { min: 1, max: limits.max_steps });
  offerLoras(loras);
  offerSizes(limits);
  writeSettings(before);
}

/** The body of a request with the form's settings. */
export function readSettings() {
  const body = {};
  for (const name of TEXTS) if ($(name).value !== "") body[name] = $(name).value;
  for (const name of NUMBERS) if ($(name).value !== "") body[name] = Number($(name).value);
  const images = Number($("num_images").value);
  if (images > 1) body.num_images = images;
  const cache = chosen($("cache"));
  if (cache === "threshold") body.cache = Number($("cache-threshold").value || 0.1);
  else if (cache) body.cache = cache;
  readTemplate(body);
  const loras = loraValues();
  if (loras.length) body.loras = loras;
  return body;
}

function readTemplate(body) {
  const template = $("template").value;
  if (template === "panel") {
    body.panel = { position: $("panel-position").value };
    if ($("panel-content").value) body.panel.content = $("panel-content").value;
  } else if (template === OWN) {
    body.system_prompt = $("system_prompt").value;
  } else if (template) {
    body.system_prompt = template;
  }
}

/** Puts the settings of a body into the form; what it leaves out becomes empty. */
export function writeSettings(body) {
  for (const name of [...TEXTS, ...NUMBERS]) $(name).value = body[name] ?? "";
  $("num_images").value = `${body.num_images ?? 1}`;
  const threshold = typeof body.cache === "number";
  choose($("cache"), threshold ? "threshold" : (body.cache ?? ""));
  $("cache-threshold").value = threshold ? body.cache : "";
  const system = body.system_prompt ?? "";
  const known = system === "" || templates.includes(system);
  $("template").value = body.panel ? "panel" : known ? system : OWN;
  $("system_prompt").value = known ? "" : system;
  $("panel-position").value = body.panel?.position ?? "lower half";
  $("panel-content").value = body.panel?.content ?? "";
  setLoras(body.loras ?? []);
  refresh();
}

/** What follows from the settings: placeholders, parts that only some choices need, the count. */
export function refresh() {
  const preset = $("preset").value;
  for (const name of ["width", "height", "num_inference_steps", "guidance_scale", "shift"]) {
    $(name).placeholder = fallback(name, preset) ?? "default";
  }
  for (const [id, name] of [["sampler", "sampler"], ["template", "system_prompt"]]) {
    const value = fallback(name, preset);
    const known = id === "sampler" || templates.includes(value);
    if ($(id).options.length) $(id).options[0].text = value && known ? `default (${value})` : "default";
  }
  show($("system_prompt"), $("template").value === OWN);
  show($("panel-fields"), $("template").value === "panel");
  show($("cache-threshold"), chosen($("cache")) === "threshold");
  const body = readSettings();
  const set = MORE.filter((name) => name in body).length;
  $("more-count").textContent = set ? `${set} set` : "";
  $("lock").setAttribute("aria-pressed", `${"seed" in body}`);
  showRatio();
}

/** A select or number field for one setting of a comparison; `value` may be any setting's. */
export function copyControl(name, label, value) {
  const source = name === "system_prompt" ? $("template") : $(name);
  const id = `${label.toLowerCase()}-value`;
  let control;
  if (name === "cache") {
    control = el("select", { id }, ...["off", "balanced", "fast"].map((item) => new Option(item)));
  } else if (source.tagName === "SELECT") {
    const options = [...source.options].filter((option) => option.text !== OWN && option.value !== "panel");
    control = el("select", { id }, ...options.map((option) => new Option(option.text, option.value)));
  } else {
    control = el("input", { id, type: "number", step: source.step, placeholder: source.placeholder });
  }
  control.value = value ?? "";
  return [el("label", { htmlFor: id, textContent: label }), control];
}
