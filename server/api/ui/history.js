// What this browser drew before: entries {id, at, body, status, images, …}, the newest first.
import { keep, load } from "./storage.js";

const NAME = "history";
const MAX_ENTRIES = 60;
const KEPT = ["id", "status", "images", "model", "timings", "steps", "warnings", "prompt_tokens"];

let entries = [];

/** Reads what is kept: another window may have changed it. */
function read() {
  const kept = load(NAME, []);
  entries = Array.isArray(kept) ? kept.filter((entry) => entry?.id && entry.body) : [];
}

read();

const store = () => {
  // A full storage loses the oldest first.
  while (!keep(NAME, entries) && entries.length > 1) entries = entries.slice(0, -1);
};

export const history = () => entries;

export const find = (id) => entries.find((entry) => entry.id === id) ?? null;

/** What is kept of a job: its settings with the seed it got, and the answer's figures. */
export function remember(job, body, extra = {}) {
  read();
  const before = find(job.id);
  const entry = { ...before, at: before?.at ?? Date.now(), body: { ...body, seed: job.seed }, ...extra };
  for (const name of KEPT) if (job[name] !== undefined && job[name] !== null) entry[name] = job[name];
  entries = before
    ? entries.map((other) => (other.id === job.id ? entry : other))
    : [entry, ...entries].slice(0, MAX_ENTRIES);
  store();
  return entry;
}

export function remove(id) {
  read();
  entries = entries.filter((entry) => entry.id !== id);
  store();
}

export function clear() {
  entries = [];
  store();
}
