
// Sends a prompt to several tasks at once and shows their answers side by side.

const MAX_TASKS = 5; // a browser opens six connections to a server, and the board needs one
let asking = null; // aborts the running requests

function offerTasks(names) {
  const box = byId("ask-tasks");
  const old = [...box.querySelectorAll("input")];
  if (old.map((input) => input.value).join("\n") === names.join("\n")) return;
  for (const label of box.querySelectorAll("label")) label.remove();
  names.forEach((name, index) => {
    const input = make("input", { type: "checkbox", value: name });
    input.checked = index < MAX_TASKS;
    box.append(make("label", {}, input, ` ${name}`));
  });
}

const chosenTasks = () => [...byId("ask-tasks").querySelectorAll("input:checked")].map((input) => input.value);

async function ask() {
  const tasks = chosenTasks();
  if (!tasks.length || tasks.length > MAX_TASKS) {
    write("ask-note", tasks.length ? `Choose at most ${MAX_TASKS} tasks.` : "Choose a task.");
    return;
  }
  asking = new AbortController();
  setAsking(true);
  write("ask-note", `Sending to ${plural(tasks.length, "task", "tasks")} …`);
  const random = crypto.getRandomValues(new Uint8Array(8));
  const session = `live-page-${[...random].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
  const body = {
    messages: [{ role: "user", content: byId("prompt").value }],
    max_tokens: byId("max-tokens").valueAsNumber,
    temperature: 0,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  const cards = tasks.map((task) => new AnswerCard(task));
  byId("answers").replaceChildren(...cards.map((card) => card.element));
  const signal = asking.signal;
  try {
    await Promise.all(cards.map((card) => answer(card, { model: card.task, ...body }, session, signal)));
  } finally {
    setAsking(false);
  }
  showTotals(cards.filter((card) => card.usage));
}

function setAsking(now) {
  byId("send").disabled = now;
  byId("stop").disabled = !now;
}

function showTotals(cards) {
  const sum = (number) => cards.reduce((total, card) => total + number(card.usage), 0);
  const prompt = sum((usage) => usage.prompt_tokens), cached = sum((usage) => usage.prompt_tokens_details.cached_tokens);
  const page = shown ? shown.page_size : 0;
  const summary = `${count(cached)} of ${plural(prompt, "prompt token", "prompt tokens")} of ${plural(cards.length, "answer", "answers")} reused KV that was cached or being computed.`;
  write("ask-note", cards.length ? `${summary} Full pages of ${page} tokens are shared.` : "");
}

async function answer(card, body, session, signal) {
  const sent = performance.now();
  try {
    const response = await call("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", "x-session-id": session },
      body: JSON.stringify(body),
      signal,
    });
    if (!response.ok) return card.fail(await errorOf(response));
    for await (const data of streamed(response)) {
      if (data === "[DONE]") return card.end();
      const chunk = JSON.parse(data);
      if (chunk.error) return card.fail(chunk.error.message);
      card.add(chunk, performance.now() - sent);
    }
    card.fail("The stream ended early.");
  } catch (error) {
    if (signal.aborted) card.stop();
    else if (error instanceof Unreachable) card.fail(error.message);
    else throw error;
  }
}

async function errorOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server returned status ${response.status}.`;
  }
}

async function* streamed(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await network(reader.read());
    if (done) return;
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) yield line.replace(/^data: /, "");
  }
}

class AnswerCard {
  constructor(task) {
    this.task = task;
    this.usage = null;
    this.first = this.last = null; // ms after sending
    this.reason = "";
    this.state = make("span", {}, "waiting");
    this.text = make("div", { class: "text", tabindex: 0, role: "region", "aria-label": `Answer of ${task}` }, "");
    this.figures = {};
    const list = make("dl", {});
    for (const name of ["first token", "cached / prompt tokens", "answer tokens", "tokens/s"]) {
      this.figures[name] = make("dd", {}, "–");
      list.append(make("div", {}, make("dt", {}, name), this.figures[name]));
    }
    this.element = make("article", { class: "answer" }, make("h3", {}, task, this.state), this.text, list);
    this.element.dataset.task = task;
  }

  add(chunk, ms) {
    this.first ??= ms;
    const [choice] = chunk.choices;
    if (choice) {
      this.state.textContent = "generating";
      if (choice.delta.content) this.text.append(choice.delta.content);
      this.reason = choice.finish_reason || this.reason;
    }
    if (chunk.usage) this.showUsage(chunk.usage, choice ? ms : this.last);
  }

  showUsage(usage, ms) {
    if (!this.usage || usage.completion_tokens > this.usage.completion_tokens) this.last = ms;
    this.usage = usage;
    const { prompt_tokens: prompt, completion_tokens: made, prompt_tokens_details: details } = usage;
    this.figures["first token"].textContent = `${Math.round(this.first)} ms`;
    this.figures["cached / prompt tokens"].textContent = `${count(details.cached_tokens)} / ${count(prompt)}`;
    this.figures["answer tokens"].textContent = count(made);
    const seconds = (this.last - this.first) / 1000;
    this.figures["tokens/s"].textContent = made > 1 && seconds > 0 ? ((made - 1) / seconds).toFixed(1) : "–";
  }

  end() {
    this.state.textContent = this.reason === "length" ? "token limit" : "done";
  }

  stop() {
    this.state.textContent = "stopped";
  }

  fail(message) {
    this.state.textContent = "error";
    this.text.append(make("p", { class: "error", role: "alert" }, message));
  }
}
