// The state of the service: workers, running and waiting jobs, of every pool.
import { $, count, el, roughly, sleep } from "./dom.js";
import { getJson, hasKey } from "./http.js";
import { drawOpenJobs } from "./open-jobs.js";

const LOOK_MS = 4000;
const KEYED_MS = 10000; // looks count towards the rate of an API key
const QUIET_MS = 15000; // after trouble

let pools = [];
let served = null; // hash of the default model
let onOtherModel = () => {};

/** Estimated seconds until a waiting job starts, or null. */
export function startsIn(job) {
  if (job.estimated_start_s !== undefined) return job.estimated_start_s;
  const pool = pools[0];
  if (!pool || pool.work_s === null || !job.position || !pool.queued) return null;
  return (pool.work_s * Math.min(job.position - 1, pool.queued)) / pool.queued;
}

function tell(state, text) {
  $("service-dot").dataset.state = state;
  $("service-line").textContent = text;
}

function summary() {
  const workers = pools.reduce((sum, pool) => sum + pool.workers, 0);
  const busy = pools.reduce((sum, pool) => sum + pool.running + pool.queued, 0);
  if (!workers) return tell("wait", "no worker yet");
  const model = pools[0].model;
  return tell("ready", busy ? `${model} · ${count(busy, "job")}` : `${model} · ready`);
}

function details(pool) {
  const rows = [
    ["model", pool.model],
    ["weights", pool.hash.slice(0, 12)],
    ["workers", pool.workers || "none"],
    ["running", count(pool.running, "job")],
    ["waiting", `${pool.queued} of at most ${pool.queue_limit}`],
  ];
  if (pools.length > 1) rows.unshift(["pool", pool.pool]);
  if (pool.queued && pool.work_s !== null) rows.push(["done with them", `in about ${roughly(pool.work_s)}`]);
  const list = el("dl", { className: "facts" });
  for (const [name, value] of rows) list.append(el("dt", { textContent: name }), el("dd", { textContent: value }));
  return list;
}

/** Asks once, and shows the answer. */
export async function lookAtService() {
  ({ pools } = await getJson("/state"));
  summary();
  const [first] = pools;
  if (first && served && first.hash !== served) onOtherModel();
  served = first?.hash ?? served;
  $("service-pools").replaceChildren(...pools.map(details));
  if ($("service").open) await drawOpenJobs();
}

/** Goes on asking while the page is seen; `onModel` is called when another model is served. */
export async function watchService(onModel) {
  onOtherModel = onModel;
  for (;;) {
    let pause = hasKey() ? KEYED_MS : LOOK_MS;
    if (!document.hidden) {
      try {
        await lookAtService();
      } catch (error) {
        pause = Math.max(1000 * (error.retryAfter ?? 0), error.status === 503 ? LOOK_MS : QUIET_MS);
        tell("bad", error.status === 401 ? "needs an API key" : error.message);
        pools = [];
      }
    }
    await sleep(pause);
  }
}

/** The panel closes by Escape and by a click elsewhere. */
export function wireService() {
  const panel = $("service");
  panel.addEventListener("toggle", () => {
    if (panel.open) lookAtService().catch(() => {}); // the watcher tells what is wrong
  });
  document.addEventListener("click", (event) => {
    if (!panel.contains(event.target)) panel.open = false;
  });
  panel.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !panel.open) return;
    event.stopPropagation();
    panel.open = false;
    panel.querySelector("summary").focus();
  });
}
