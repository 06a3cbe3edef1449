// The page: draws one picture or two, keeps what came of it, and ties the parts together.
import { openCode, wireCode } from "./code.js";
import { readVariants, setComparing, wireCompare } from "./compare.js";
import { showComparison } from "./compare-view.js";
import { $, chosen, el, show } from "./dom.js";
import { addExamples } from "./examples.js";
import { clearProblems, showAlert, showProblems, unreadable } from "./fields.js";
import { offerSettings, readSettings, refresh, writeSettings } from "./form.js";
import { clear, find, history, remember, remove } from "./history.js";
import { drawHistory, wireHistory } from "./history-view.js";
import { Problem, getJson, request } from "./http.js";
import { cancel, ended, follow, submit } from "./job.js";
import { wireKey } from "./key.js";
import { learnOffer } from "./offer.js";
import { thumbnail } from "./picture.js";
import { endProgress, say, showPreview, showProgress, startProgress } from "./progress.js";
import { showResult, showWarnings } from "./result.js";
import { rememberSeed, wireSeed } from "./seed.js";
import { lookAtService, watchService, wireService } from "./service.js";
import { wireSizes } from "./sizes.js";
import { wireTheme } from "./theme.js";

let busy = false;
let running = null; // id of the job that is followed
let stopped = false; // the reader has canceled

const onOpen = (id) => open(id);
const onRemove = (id) => {
  remove(id);
  drawHistory({ onOpen, onRemove });
};
const onKeepSeed = (seed) => {
  $("seed").value = seed;
  refresh();
  $("seed").focus();
};
const actions = { onKeepSeed, onCode: openCode };

/** Follows a job that was submitted with `body` to its end; gives its entry of the history. */
async function finish(job, body, prefix = "") {
  running = job.id;
  remember(job, body);
  if (stopped) await cancel(job.id);
  const end = await follow(job, {
    onChange: (news) => showProgress(news, prefix),
    onPreview: (url) => showPreview($("frame"), url),
  });
  running = null;
  const thumb = end.status === "succeeded" ? await thumbnail(end.images[0].url) : null;
  const entry = remember(end, body, { thumb });
  drawHistory({ onOpen, onRemove }, entry.id);
  if (end.status !== "succeeded") {
    empty("No picture came of this.");
    const text = end.status === "canceled" ? "Canceled." : (end.error?.detail ?? `The job ended as ${end.status}.`);
    const failure = new Error(text);
    failure.calm = end.status === "canceled";
    throw failure;
  }
  rememberSeed(end.seed);
  return entry;
}

function empty(text) {
  $("frame").replaceChildren(el("p", { className: "hint", textContent: text }));
}

async function drawOne() {
  const body = readSettings();
  const entry = await finish(await submit(body), body);
  showResult(entry, actions);
  say("Done. The picture is here.");
}

/** One after the other, so that they do not share the device and the times can be compared. */
async function drawTwo() {
  const variants = readVariants();
  const entries = [];
  for (const { letter, body } of variants) {
    if (stopped) throw Object.assign(new Error("Canceled."), { calm: true });
    entries.push(await finish(await submit(body), body, `${letter}: `));
  }
  await showComparison(entries, variants.map(({ label }) => label), openCode);
  say("Done. Both pictures are here.");
}

/** Runs `work` as the one thing that goes on, and shows what goes wrong. */
async function occupy(work) {
  if (busy) return;
  busy = true;
  stopped = false;
  $("generate").disabled = true;
  show($("cancel"), true);
  clearProblems();
  showAlert("");
  showWarnings([]);
  const before = ["frame", "report"].map((id) => [$(id), [...$(id).childNodes]]);
  $("report").replaceChildren();
  startProgress($("frame"), "Progress of the picture");
  $("frame").scrollIntoView({ block: "nearest" });
  try {
    await work();
  } catch (error) {
    // What was never begun leaves the stage as it was.
    if (error instanceof Problem) for (const [node, children] of before) node.replaceChildren(...children);
    report(error);
  } finally {
    busy = false;
    running = null;
    $("generate").disabled = false;
    show($("cancel"), false);
    endProgress();
    if (document.activeElement === document.body) $("generate").focus({ preventScroll: true });
    lookAtService().catch(() => {}); // the watcher tells what is wrong
  }
}

function report(error) {
  const again = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  const homeless = showProblems(error.fields ?? []);
  if (error.calm) say(error.message);
  if (error.fields?.length && !homeless.length) showAlert("");
  else showAlert((homeless[0] ?? error.message) + again);
}

function generate() {
  if (busy) return;
  clearProblems();
  const wrong = unreadable($("form"));
  if (wrong.length) {
    showProblems(wrong);
    return;
  }
  occupy(chosen($("mode")) === "compare" ? drawTwo : drawOne);
}

async function stop() {
  if (!busy || stopped) return;
  stopped = true;
  $("status").textContent = "Canceling…";
  if (running) await cancel(running).catch((error) => showAlert(error.message));
}

/** Shows an entry of the history and restores its settings. */
async function open(id) {
  const entry = find(id);
  if (!entry) return;
  writeSettings(entry.body);
  clearProblems();
  showAlert("");
  if (busy) return; // the settings are back; the stage is taken
  drawHistory({ onOpen, onRemove }, id);
  showEntry(entry);
  try {
    const job = await getJson(`/jobs/${id}`); // its pictures' addresses may have a date
    if (!busy && ended(job)) showEntry(remember(job, entry.body));
  } catch (error) {
    if (error.status !== 404) showAlert(error.message);
  }
}

function showEntry(entry) {
  if (entry.status === "succeeded" && entry.images?.length) {
    showResult(entry, actions);
    return;
  }
  empty("No picture came of this.");
  $("report").replaceChildren();
  showWarnings([]);
  showAlert(`This job ended as ${entry.status}. Its settings are back in the form.`);
}

/** A picture that was on its way when the page was left is followed to its end. */
function resume() {
  const entry = history().find(({ status }) => status === "queued" || status === "running");
  if (!entry) return;
  occupy(async () => {
    const job = await getJson(`/jobs/${entry.id}`).catch((error) => {
      if (error.status === 404) remove(entry.id);
      throw error;
    });
    showResult(await finish(job, entry.body), actions);
  });
}

async function clearHistory(there) {
  const ids = history().map(({ id }) => id);
  clear();
  drawHistory({ onOpen, onRemove }, null);
  $("clear").close();
  if (!there) return;
  const answers = await Promise.allSettled(ids.map((id) => request(`/jobs/${id}`, { method: "DELETE" })));
  const failed = answers.filter(({ reason }) => reason && reason.status !== 404).length;
  if (failed) showAlert(`${failed} of ${ids.length} could not be erased.`);
}

function wire() {
  const compare = () => {
    const two = chosen($("mode")) === "compare";
    setComparing(two);
    $("generate-label").textContent = two ? "Compare" : "Generate";
  };
  $("mode").addEventListener("change", compare);
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  $("form").addEventListener("input", refresh);
  $("cancel").addEventListener("click", stop);
  $("reset").addEventListener("click", () => writeSettings({ prompt: $("prompt").value }));
  $("history-clear").addEventListener("click", () => $("clear").showModal());
  $("clear-here").addEventListener("click", () => clearHistory(false));
  $("clear-there").addEventListener("click", () => clearHistory(true));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !document.querySelector("dialog[open]")) {
      event.preventDefault();
      generate();
    } else if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
      stop();
    }
  });
  addExamples((text) => {
    $("prompt").value = text;
    $("prompt").focus();
  });
  if (/Mac|iP(hone|ad)/.test(navigator.platform)) $("generate-key").textContent = "⌘ ↵";
}

async function start() {
  wire();
  for (const part of [wireTheme, wireCode, wireCompare, wireService]) part();
  for (const part of [wireSizes, wireSeed]) part(refresh);
  wireHistory({ onRemove });
  wireKey(() => lookAtService().catch(() => {}));
  drawHistory({ onOpen, onRemove });
  watchService(async () => offerSettings(await learnOffer()));
  offerSettings(await learnOffer());
  resume();
}

start();
