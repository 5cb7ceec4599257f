
// What the server is doing: one snapshot of /live on the board.

let shown = null; // the last snapshot

function showBoard(data) {
  shown = data;
  const about = [`version ${data.version}`, data.base, `up ${age(data.uptime_seconds)}`];
  write("about", about.filter(Boolean).join(" · "));
  showTiles(data);
  showLatency();
  showTokensAndPages(data);
  showTasks(data);
  showSessions(data);
}

function showTiles(data) {
  const sum = (key) => data.tasks.reduce((total, task) => total + task[key], 0);
  const ended = data.tasks.reduce((total, task) => total + task.ended.finished, 0);
  write("now", `${count(sum("running"))} running`);
  write("now-note", `${count(sum("waiting"))} waiting · ${count(ended)} finished since the start`);
  const { prefilled_tokens: prefilled, reused_tokens: reused } = data.prefill;
  write("reused", percent(reused, prefilled + reused));
  write("reused-note", `${count(reused)} reused, ${count(prefilled)} prefilled (counted)`);
  const rate = data.prefill.tokens_per_second;
  write("saved", rate === null ? "–" : `≈ ${duration(data.prefill.seconds_saved_estimate)}`);
  write("saved-note", rate === null ? "nothing was prefilled yet" : `reused tokens at ${count(Math.round(rate))} tokens/s, the best measured`);
  const first = data.latency.ttft_seconds;
  write("ttft", duration(first && first.p50));
  write("ttft-note", first ? `95th percentile ${duration(first.p95)}, last 10 min` : "no request in the last 10 minutes");
}

function showLatency() {
  if (!shown) return;
  const { latency, window: span } = shown;
  const kind = document.querySelector("input[name=latency]:checked");
  const points = latency.buckets
    .filter((one) => one[kind.value] && one.seconds_ago < span.seconds)
    .map((one) => ({ ago: Math.max(one.seconds_ago - latency.bucket_seconds / 2, 0), ended: one.ended, ...one[kind.value] }));
  const svg = byId("latency-chart");
  const name = kind.value === "ttft_seconds" ? "Time to the first token" : "Time of whole requests";
  const all = latency[kind.value];
  const told = all ? `median ${duration(all.p50)}, 95th percentile ${duration(all.p95)}` : "no request ended";
  svg.setAttribute("aria-label", `${name} over the last 10 minutes: ${told}.`);
  // A server that has just started has nothing further back.
  const back = [60, 120, 300].find((seconds) => shown.uptime_seconds < seconds) || span.seconds;
  drawLines(svg, points, back, latency.bucket_seconds);
  const cut = span.full ? " (of more than are kept)" : "";
  const ended = `${plural(span.requests, "request", "requests")} ended in the last 10 minutes${cut}; `;
  write("latency-note", span.requests ? `${ended}a point stands for ${latency.bucket_seconds} seconds.` : "No request has ended in the last 10 minutes.");
}

function showTokensAndPages(data) {
  const { prefilled_tokens: prefilled, reused_tokens: reused } = data.prefill;
  const parts = [["prefilled", prefilled, "prefilled"], ["reused", reused, "reused"]];
  byId("prefill-chart").replaceChildren(bar("since the start", parts));
  byId("pool-charts").replaceChildren(
    ...data.pools.map((pool) => bar(pool.name, ["used", "cached", "free"].map((state) => [state, pool[state], state]))),
  );
}

function showTasks(data) {
  fill("tasks", data.tasks, "This server has no task.", (task) => [
    make("th", { scope: "row", title: task.name }, task.name),
    ...[task.running, task.waiting, task.ended.finished, task.ended.aborted, task.ended.failed, task.prompt_tokens].map(number),
    share(task.cached_tokens, task.prompt_tokens),
    number(task.generated_tokens),
    ...[task.ttft_seconds, task.request_seconds].flatMap((one) => [cell(duration(one && one.p50)), cell(duration(one && one.p95))]),
  ]);
}

function showSessions(data) {
  const empty = "No session yet. Calls that share a growing context name it in the header x-session-id, or in prompt_cache_key or user.";
  fill("sessions", data.sessions, empty, (one) => [
    make("th", { scope: "row" }, make("code", {}, one.label)),
    ...[one.live, one.calls, one.prompt_tokens].map(number),
    share(one.cached_tokens, one.prompt_tokens),
    cell(one.last_task),
    cell(one.live ? "now" : `${age(one.seconds_ago)} ago`),
  ]);
  const without = data.ended_without_session;
  const named = "A label stands for the session's key, which is not shown.";
  write("sessions-note", without ? `${named} ${plural(without, "request", "requests")} ended without a session.` : named);
}

function fill(table, rows, empty, cells) {
  const body = byId(table).tBodies[0];
  const none = make("tr", {}, make("td", { colspan: 13, class: "empty" }, empty));
  body.replaceChildren(...(rows.length ? rows.map((row) => make("tr", {}, ...cells(row))) : [none]));
}

const cell = (text) => make("td", text === "–" || text === "0" ? { class: "none" } : {}, text);
const number = (value) => cell(count(value));
const share = (part, whole) => cell(part ? `${count(part)} (${percent(part, whole)})` : "0");
