// One job from its submission to its end.
import { sleep } from "./dom.js";
import { Problem, getJson, postJson } from "./http.js";
import { events } from "./sse.js";

const ENDS = new Set(["succeeded", "failed", "canceled", "expired"]);
const LOOK_MS = 1000;
const MAX_MISSES = 40;

export const ended = (job) => ENDS.has(job.status);

export const submit = (body) => postJson("/generate", body, { prefer: "respond-async" });

export const cancel = (id) => postJson(`/jobs/${id}/cancel`, {});

/**
 * Follows a job by its events and, for the place in the queue, by asking; resolves to its end.
 * `onChange` gets the job with what is new; `onPreview` the address of an unfinished picture.
 * A short outage of the service is waited out.
 */
export async function follow(job, { onChange, onPreview }) {
  const stop = new AbortController();
  let current = job;
  const change = (news) => {
    // An answer may be older than an event that came meanwhile.
    if (ended(current) || stop.signal.aborted) return;
    if (!ended(news) && news.attempt === current.attempt && news.step < current.step) return;
    current = { ...current, trouble: null, ...news };
    if (!ended(current)) onChange(current);
  };
  listen(job.id, { change, onPreview }, stop.signal);
  let misses = 0;
  try {
    for (;;) {
      try {
        const answer = await getJson(`/jobs/${job.id}`);
        misses = 0;
        if (ended(answer)) return answer;
        change(answer);
      } catch (error) {
        if (!(error instanceof Problem) || error.status === 404 || error.status === 401) throw error;
        if (++misses > MAX_MISSES) throw error;
        onChange({ ...current, trouble: error.message });
      }
      if (ended(current)) return current;
      // Events bring the rest at once; asking finds the place in the queue, and what they missed.
      await Promise.race([sleep(LOOK_MS), endOf(() => ended(current), stop.signal)]);
    }
  } finally {
    stop.abort();
  }
}

async function endOf(condition, signal) {
  while (!condition() && !signal.aborted) await sleep(30);
}

/** Passes on events until the job has ended or `signal` says so; comes back when cut off. */
async function listen(id, { change, onPreview }, signal) {
  let lastId = "";
  while (!signal.aborted) {
    try {
      for await (const event of events(`/jobs/${id}/events`, lastId, signal)) {
        if (event.id) lastId = event.id;
        const data = JSON.parse(event.data);
        if (event.event === "preview") onPreview(`data:${data.media_type};base64,${data.b64_json}`);
        else change(data);
        if (ENDS.has(event.event)) return;
      }
    } catch (error) {
      if (error.status === 404 || error.status === 401) return;
    }
    await sleep(LOOK_MS);
  }
}
