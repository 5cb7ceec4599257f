
// Polls /live; handles the key, the connection's state and all events.

const POLL_MS = 2000, TIMEOUT_MS = 8000;
const KEY = "pshare_jax API key";
let timer = null, turn = 0;

class Unreachable extends Error {}

/** Awaits a network promise; every failure but an abort becomes Unreachable. */
async function network(promise) {
  try {
    return await promise;
  } catch (error) {
    throw error.name === "AbortError" ? error : new Unreachable("The server cannot be reached.");
  }
}

/** fetch with the key; a header consists of bytes, and the server compares UTF-8. */
function call(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${String.fromCharCode(...new TextEncoder().encode(key))}`;
  return network(fetch(path, { ...options, headers }));
}

async function poll() {
  clearTimeout(timer);
  const mine = ++turn;
  const [next, value] = await fetchLive();
  if (mine !== turn) return; // a newer poll has started
  next(value);
  if (next !== requestKey) timer = setTimeout(poll, POLL_MS);
}

/** The next function to call, and its argument. */
async function fetchLive() {
  try {
    const response = await call("/live", { signal: AbortSignal.timeout(TIMEOUT_MS), cache: "no-store" });
    if (response.status === 401) return [requestKey];
    return response.ok ? [show, await network(response.json())] : [showFailure, await errorOf(response)];
  } catch (error) {
    if (error instanceof Unreachable) return [showFailure, error.message];
    throw error;
  }
}

function show(data) {
  byId("key").hidden = true;
  byId("board").hidden = false;
  byId("board").classList.remove("old");
  byId("forget").hidden = !sessionStorage.getItem(KEY);
  showTrouble(data.healthy ? "" : "The server accepts no requests: it is stopping, or a worker has failed or is stuck; see the server's log.");
  setState(data.healthy ? "good" : "bad", data.healthy ? "live" : "unhealthy");
  showBoard(data);
  offerTasks(data.tasks.filter((task) => task.served).map((task) => task.name));
}

function showFailure(message) {
  const old = shown ? " The page shows the last data." : "";
  showTrouble(`${message}${old} Retrying every ${POLL_MS / 1000} seconds.`);
  byId("board").classList.add("old");
  setState("bad", "unreachable");
}

function requestKey() {
  const wrong = sessionStorage.getItem(KEY) !== null;
  sessionStorage.removeItem(KEY);
  byId("board").hidden = byId("forget").hidden = true;
  byId("key").hidden = false;
  write("key-message", wrong ? "The server refused this key." : "This server needs its API key.");
  showTrouble("");
  setState("", "key required");
  byId("key-value").focus();
}

function showTrouble(text) {
  if (byId("trouble").textContent === text) return;
  write("trouble", text);
  byId("trouble").hidden = !text;
}

function setState(kind, text) {
  byId("state").className = kind;
  if (byId("state").textContent !== text) write("state", text);
}

byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key-value").value.trim());
  byId("key-value").value = "";
  poll();
});
byId("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  poll();
});
byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !byId("send").disabled) {
    event.preventDefault();
    byId("ask").requestSubmit();
  }
});
byId("stop").addEventListener("click", () => asking.abort());
for (const input of document.querySelectorAll("input[name=latency]")) input.addEventListener("change", showLatency);
new ResizeObserver(showLatency).observe(byId("latency-chart"));
document.addEventListener("visibilitychange", () => {
  // A hidden page does not poll.
  if (document.hidden) clearTimeout(timer);
  else if (byId("key").hidden) poll();
});
poll();
