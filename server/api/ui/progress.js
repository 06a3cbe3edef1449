// How far a job is: in words, as a bar, as an unfinished picture, and aloud now and then.
import { $, el, roughly, show } from "./dom.js";
import { startsIn } from "./service.js";

let began = null; // {step, at} of the first step seen
let said = "";

/** Speaks to a screen reader; the same sentence twice is said once. */
export function say(text) {
  if (text === said) return;
  said = text;
  $("spoken").textContent = text;
}

export function startProgress(frame, label) {
  began = null;
  said = "";
  frame.replaceChildren(el("div", { className: "waiting", attrs: { "aria-hidden": "true" } }));
  $("bar").removeAttribute("value");
  $("bar").setAttribute("aria-label", label);
  line("Sending…");
  show($("progress"), true);
}

export function endProgress() {
  show($("progress"), false);
}

function line(status, eta = "") {
  $("status").textContent = status;
  $("eta").textContent = eta;
}

/** Shows a job that has not ended. */
export function showProgress(job, prefix = "") {
  const again = job.attempt > 1 ? ` (attempt ${job.attempt})` : "";
  if (job.trouble) {
    line(`${job.trouble} Trying again…`);
  } else if (job.status === "queued") {
    const ahead = job.position > 1 ? `${prefix}Waiting, ${job.position - 1} ahead` : `${prefix}Next in the queue`;
    line(ahead + again, estimate(job));
    say(ahead);
  } else if (!job.total) {
    line(`${prefix}Preparing…${again}`);
    say(`${prefix}Started`);
  } else {
    line(`${prefix}Step ${job.step} of ${job.total}${again}`, remaining(job));
    const quarter = Math.floor((4 * job.step) / job.total) * 25;
    say(quarter ? `${prefix}${quarter} percent` : `${prefix}Started`);
  }
  if (job.status === "running" && job.total) {
    $("bar").max = job.total;
    $("bar").value = job.step;
  } else {
    $("bar").removeAttribute("value");
  }
}

function estimate(job) {
  const wait = startsIn(job);
  return wait === null ? "" : `starts in about ${roughly(wait)}`;
}

function remaining(job) {
  const now = performance.now();
  if (!began || job.step < began.step) began = { step: job.step, at: now };
  if (job.step <= began.step) return "";
  const left = ((now - began.at) / (job.step - began.step)) * (job.total - job.step) / 1000;
  return left > 0.8 ? `about ${roughly(left)} left` : "";
}

/** Shows an unfinished picture. */
export function showPreview(frame, url) {
  const image = frame.querySelector(".preview img");
  if (image) image.src = url;
  else frame.replaceChildren(el("div", { className: "preview" }, el("img", { src: url, alt: "Unfinished picture" })));
}
