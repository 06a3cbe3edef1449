// The caller's jobs that have not ended, whatever sent them, each with a way to cancel it.
import { $, el } from "./dom.js";
import { getJson } from "./http.js";
import { cancel } from "./job.js";

const MAX_SHOWN = 6;

function item(job) {
  const what = job.status === "queued" ? `waiting, place ${job.position ?? "?"}` : `step ${job.step} of ${job.total || "?"}`;
  const name = `…${job.id.slice(-8)}`;
  const button = el("button", {
    type: "button", className: "quiet", textContent: "Cancel", attrs: { "aria-label": `Cancel job ${name}` },
  });
  button.addEventListener("click", async () => {
    button.disabled = true;
    await cancel(job.id).catch(() => {}); // the next look shows what holds
    await drawOpenJobs().catch(() => {});
  });
  return el("li", {}, el("span", {}, el("code", { textContent: name }), ` ${what}`), button);
}

/** Asks for them and shows them. */
export async function drawOpenJobs() {
  const answers = await Promise.all(
    ["running", "queued"].map((status) => getJson(`/jobs?status=${status}&limit=${MAX_SHOWN}`)),
  );
  const jobs = answers.flatMap((answer) => answer.jobs).slice(0, MAX_SHOWN);
  $("open-jobs").replaceChildren(...jobs.map(item));
  $("open-jobs-none").hidden = jobs.length > 0;
}
