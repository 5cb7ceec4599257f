
// Shows a snapshot of /live.

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
  write("saved-note", rate === null ? "nothing prefilled yet" : `reused tokens at ${count(Math.round(rate))} tokens/s, the best measured`);
  const first = data.latency.ttft_seconds;
  write("ttft", duration(first && first.p50));
  write("ttft-note", first ? `95th percentile ${duration(first.p95)}, last 10 min` : "no request in the last 10 minutes");
}

function showLatency() {
  if (!shown) return;
  const { latency, window: span } = shown;
  const kind = document.querySelector("input[name=latency]:checked");
  const points = latency.buckets
    .filter((bucket) => bucket[kind.value] && bucket.seconds_ago < span.seconds)
    .map((bucket) => ({ ago: Math.max(bucket.seconds_ago - latency.bucket_seconds / 2, 0), ended: bucket.ended, ...bucket[kind.value] }));
  const svg = byId("latency-chart");
  const name = kind.value === "ttft_seconds" ? "Time to first token" : "Request time";
  const all = latency[kind.value];
  const summary = all ? `median ${duration(all.p50)}, 95th percentile ${duration(all.p95)}` : "no request ended";
  svg.setAttribute("aria-label", `${name} over the last 10 minutes: ${summary}.`);
  // Shortly after the start the chart spans only the uptime.
  const back = [60, 120, 300].find((seconds) => shown.uptime_seconds < seconds) || span.seconds;
  drawLines(svg, points, back, latency.bucket_seconds);
  const cut = span.full ? " (older requests are not kept)" : "";
  const ended = `${plural(span.requests, "request", "requests")} ended in the last 10 minutes${cut}; `;
  write("latency-note", span.requests ? `${ended}each point covers ${latency.bucket_seconds} seconds.` : "No request has ended in the last 10 minutes.");
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
  fill("tasks", data.tasks, "This server has no tasks.", (task) => [
    make("th", { scope: "row", title: task.name }, task.name),
    ...[task.running, task.waiting, task.ended.finished, task.ended.aborted, task.ended.failed, task.prompt_tokens].map(number),
    share(task.cached_tokens, task.prompt_tokens),
    number(task.generated_tokens),
    ...[task.ttft_seconds, task.request_seconds].flatMap((time) => [cell(duration(time && time.p50)), cell(duration(time && time.p95))]),
  ]);
}

function showSessions(data) {
  const empty = "No sessions yet. Requests name their session in the header x-session-id, or in prompt_cache_key or user.";
  fill("sessions", data.sessions, empty, (session) => [
    make("th", { scope: "row" }, make("code", {}, session.label)),
    ...[session.live, session.calls, session.prompt_tokens].map(number),
    share(session.cached_tokens, session.prompt_tokens),
    cell(session.last_task),
    cell(session.live ? "now" : `${age(session.seconds_ago)} ago`),
  ]);
  const without = data.ended_without_session;
  const note = "Labels are hashes of the session keys, which are not shown.";
  write("sessions-note", without ? `${note} ${plural(without, "request", "requests")} ended without a session.` : note);
}

function fill(table, rows, empty, cells) {
  const body = byId(table).tBodies[0];
  const none = make("tr", {}, make("td", { colspan: 13, class: "empty" }, empty));
  body.replaceChildren(...(rows.length ? rows.map((row) => make("tr", {}, ...cells(row))) : [none]));
}

const cell = (text) => make("td", text === "–" || text === "0" ? { class: "none" } : {}, text);
const number = (value) => cell(count(value));
const share = (part, whole) => cell(part ? `${count(part)} (${percent(part, whole)})` : "0");
