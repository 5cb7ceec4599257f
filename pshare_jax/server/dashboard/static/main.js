
// Asks /live again and again; the key, the state of the connection, and who listens to what.

const EVERY_MS = 2000, PATIENCE_MS = 8000;
const KEY = "pshare_jax API key";
let timer = null, turn = 0;

class NoAnswer extends Error {}

/** The promise of something from the network: what fails there, an abort excepted, is a NoAnswer. */
async function network(promise) {
  try {
    return await promise;
  } catch (error) {
    throw error.name === "AbortError" ? error : new NoAnswer("The server does not answer.");
  }
}

/** fetch with the key; a header takes bytes, and the server compares UTF-8. */
function call(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${String.fromCharCode(...new TextEncoder().encode(key))}`;
  return network(fetch(path, { ...options, headers }));
}

async function look() {
  clearTimeout(timer);
  const mine = ++turn;
  const [next, value] = await answerOfLive();
  if (mine !== turn) return; // another look began meanwhile
  next(value);
  if (next !== wantKey) timer = setTimeout(look, EVERY_MS);
}

/** What to do next, and with what. */
async function answerOfLive() {
  try {
    const response = await call("/live", { signal: AbortSignal.timeout(PATIENCE_MS), cache: "no-store" });
    if (response.status === 401) return [wantKey];
    return response.ok ? [show, await network(response.json())] : [lost, await errorOf(response)];
  } catch (error) {
    if (error instanceof NoAnswer) return [lost, error.message];
    throw error;
  }
}

function show(data) {
  byId("key").hidden = true;
  byId("board").hidden = false;
  byId("board").classList.remove("old");
  byId("forget").hidden = !sessionStorage.getItem(KEY);
  trouble(data.healthy ? "" : "The server takes no requests: it is stopping, or a worker has died or is stuck. Its log says why.");
  tellState(data.healthy ? "good" : "bad", data.healthy ? "live" : "unhealthy");
  showBoard(data);
  offerTasks(data.tasks.filter((task) => task.served).map((task) => task.name));
}

function lost(message) {
  const old = shown ? " What you see is its last answer." : "";
  trouble(`${message}${old} Trying again every ${EVERY_MS / 1000} seconds.`);
  byId("board").classList.add("old");
  tellState("bad", "no answer");
}

function wantKey() {
  const wrong = sessionStorage.getItem(KEY) !== null;
  sessionStorage.removeItem(KEY);
  byId("board").hidden = byId("forget").hidden = true;
  byId("key").hidden = false;
  write("key-told", wrong ? "The server refused this key." : "This server needs its API key.");
  trouble("");
  tellState("", "needs a key");
  byId("key-value").focus();
}

function trouble(text) {
  if (byId("trouble").textContent === text) return;
  write("trouble", text);
  byId("trouble").hidden = !text;
}

function tellState(kind, text) {
  byId("state").className = kind;
  if (byId("state").textContent !== text) write("state", text);
}

byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key-value").value.trim());
  byId("key-value").value = "";
  look();
});
byId("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  look();
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
  // A page that nobody sees asks nothing.
  if (document.hidden) clearTimeout(timer);
  else if (byId("key").hidden) look();
});
look();
