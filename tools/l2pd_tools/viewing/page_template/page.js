"use strict";

// The recorded decodes, as l2pd_tools.viewing.side_by_side writes them. All text is put into the page
// by textContent, and nothing is loaded from elsewhere.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const view = { prompt: 0, step: 0, position: null, timer: null };
const darkScheme = matchMedia("(prefers-color-scheme: dark)");

// ---- what a decode looks like after some steps

function textOf(token) {
  return data.tokens[token];
}

/** The state of a run's positions after `steps` forward passes. */
function stateAfter(run, steps) {
  const tokens = new Map();
  let size = data.positions;
  for (let i = 0; i < steps; i++) {
    const frame = run.frames[i];
    for (const at of frame.committed) {
      const index = frame.at.indexOf(at);
      tokens.set(at, { token: frame.token[index], step: i, confidence: frame.confidence[index] });
    }
    for (const at of frame.remasked) tokens.delete(at);
    if (frame.end !== null) {
      size = frame.end;
      for (const at of tokens.keys()) if (at >= size) tokens.delete(at);
    }
  }
  return { tokens, size };
}

/** The positions at which two runs end up with different tokens. */
function differences(first, second) {
  const found = [];
  const end = Math.max(first.tokens.length, second.tokens.length);
  for (let at = 0; at < end; at++) if (first.tokens[at] !== second.tokens[at]) found.push(at);
  return found;
}

// ---- small helpers

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

/** A text that breaks after "_", "(" and ",", so that the words in names of policies stay whole. */
function breakable(text) {
  const made = document.createDocumentFragment();
  for (const part of text.split(/(?<=[_(,=/])/)) made.append(part, element("wbr"));
  return made;
}

function row(heading, cells) {
  const made = element("tr");
  const head = element("th");
  head.append(breakable(heading));
  head.scope = "row";
  made.append(head);
  for (const cell of cells) {
    const td = element("td");
    td.append(cell);
    made.append(td);
  }
  return made;
}

const piece = (text) => element("span", text, "piece");
const number = (value, digits) => (value === null ? "–" : value.toFixed(digits));
const percent = (share) => (share === null ? "–" : (100 * share).toFixed(1));
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : word.endsWith("s") ? "es" : "s"}`;

// ---- one side: its canvas and its map

class Side {
  constructor(index) {
    this.index = index;
    const article = byId("side").content.firstElementChild.cloneNode(true);
    byId("sides").append(article);
    const find = (selector) => article.querySelector(selector);
    this.policy = data.policies[index];
    find("h2").append(breakable(this.policy.label));
    this.figures = (name) => find(`[data-is="${name}"]`);
    this.done = find(".done span");
    this.state = find(".state");
    this.canvas = find(".canvas");
    this.heat = find(".heat");
    this.axis = find(".axis");
    this.reading = find(".reading");
    this.canvas.addEventListener("click", (event) => {
      const token = event.target.closest(".token");
      if (token) choose(Number(token.dataset.at));
    });
    this.heat.addEventListener("pointermove", (event) => this.read(event));
    this.heat.addEventListener("pointerleave", () => { this.reading.textContent = ""; });
    this.heat.addEventListener("click", (event) => {
      const { step, at } = this.under(event);
      view.position = at;
      go(step + 1);
    });
  }

  show(run) {
    this.run = run;
    this.cells = run.frames.map((frame) => new Map(frame.at.map((at, i) => [at, i])));
    this.columns = Math.max(1, ...run.frames.map((frame) => frame.block[1]));
    this.figures("nfe").textContent = run.nfe;
    this.figures("tpf").textContent = run.tokens_per_forward.toFixed(2);
    this.figures("seconds").textContent = run.seconds.toPrecision(2);
    const verdict = { true: "valid", false: "not valid", null: "unchecked" }[String(run.valid)];
    this.figures("valid").textContent = verdict;
    this.axis.textContent = `Positions 0 to ${this.columns - 1} across; ` +
      (run.nfe === 1 ? "one step." : `steps 1 to ${run.nfe} downwards.`);
    this.heat.setAttribute("aria-label",
      `Map of ${this.policy.label}: ${plural(run.nfe, "step")} downwards, ` +
      `${plural(this.columns, "position")} across; each committed token ends its column.`);
    this.paint();
  }

  draw(step, differing) {
    const { run } = this;
    const at = Math.min(step, run.nfe);
    const { tokens, size } = stateAfter(run, at);
    const block = at < run.nfe ? run.frames[at].block : run.frames[run.nfe - 1].block;
    this.done.style.width = `${(100 * at) / run.nfe}%`;
    this.state.textContent = at === run.nfe
      ? `done after ${plural(run.nfe, "step")}, ${plural(run.length, "token")}`
      : `step ${at} of ${run.nfe}, ${plural(tokens.size, "token")} committed`;
    const cells = [];
    let spoken = "";
    for (let position = 0; position < size; position++) {
      const cell = element("span", "·", "token");
      cell.dataset.at = position;
      const known = tokens.get(position);
      if (known) {
        cell.textContent = textOf(known.token);
        cell.style.setProperty("--hue", 255 - (170 * known.step) / Math.max(run.nfe - 1, 1));
        cell.classList.toggle("special", data.special.includes(known.token));
        cell.classList.toggle("now", known.step === at - 1 && at < run.nfe);
        cell.classList.toggle("differs", differing.has(position));
      } else {
        cell.classList.add("masked");
        cell.classList.toggle("waiting", position < block[0] || position >= block[1]);
      }
      cell.classList.toggle("chosen", position === view.position);
      cells.push(cell);
      spoken += cell.textContent;
    }
    this.canvas.replaceChildren(...cells);
    this.canvas.setAttribute("aria-label", `${this.policy.label}, ${this.state.textContent}: ${spoken}`);
    this.overlay(at);
  }

  /** What the model predicted at a position in a step, or null. */
  predicted(step, at) {
    const index = this.cells[step]?.get(at);
    if (index === undefined) return null;
    const frame = this.run.frames[step];
    return {
      token: frame.token[index],
      confidence: frame.confidence[index],
      committed: frame.committed.includes(at),
    };
  }

  under(event) {
    const box = this.heat.getBoundingClientRect();
    const part = (value, size, count) =>
      Math.min(count - 1, Math.max(0, Math.floor((value / size) * count)));
    return {
      at: part(event.clientX - box.left, box.width, this.columns),
      step: part(event.clientY - box.top, box.height, this.run.nfe),
    };
  }

  read(event) {
    const { step, at } = this.under(event);
    const found = this.predicted(step, at);
    this.reading.textContent = `Step ${step + 1}, position ${at}: ` + (found
      ? `${textOf(found.token)} at ${number(found.confidence, 3)}${found.committed ? ", committed" : ""}`
      : "not predicted");
  }

  /** Draw the map without the marks of step and position, in device pixels. */
  paint() {
    const rows = this.run.nfe;
    const rowHeight = Math.min(14, Math.max(1, 240 / rows));
    this.heat.style.height = `${Math.round(rows * rowHeight) + 2}px`;
    const scale = devicePixelRatio || 1;
    const width = Math.max(1, Math.round(this.heat.clientWidth * scale));
    const height = Math.max(1, Math.round(this.heat.clientHeight * scale));
    this.heat.width = width;
    this.heat.height = height;
    this.base = new OffscreenCanvas(width, height);
    const pen = this.base.getContext("2d");
    const colours = schemeColours();
    const x = (at) => Math.round((at * width) / this.columns);
    const y = (step) => Math.round((step * height) / rows);
    pen.fillStyle = colours.surface;
    pen.fillRect(0, 0, width, height);
    this.run.frames.forEach((frame, step) => {
      frame.at.forEach((at, i) => {
        const box = [x(at), y(step), x(at + 1) - x(at), Math.max(1, y(step + 1) - y(step))];
        pen.globalAlpha = 1;
        pen.fillStyle = colours.low;
        pen.fillRect(...box);
        pen.globalAlpha = frame.confidence[i] ?? 0;
        pen.fillStyle = colours.high;
        pen.fillRect(...box);
      });
      pen.globalAlpha = 1;
      pen.fillStyle = colours.taken;
      for (const at of frame.committed) {
        pen.fillRect(x(at), y(step), x(at + 1) - x(at), Math.max(1, y(step + 1) - y(step)));
      }
    });
  }

  /** Draw the map with the marks of the current step and position. */
  overlay(step) {
    const { width, height } = this.heat;
    const pen = this.heat.getContext("2d");
    pen.drawImage(this.base, 0, 0);
    pen.strokeStyle = schemeColours().text;
    pen.lineWidth = devicePixelRatio || 1;
    if (step > 0) {
      const top = ((step - 1) * height) / this.run.nfe;
      pen.strokeRect(0.5, top + 0.5, width - 1, Math.max(2, height / this.run.nfe - 1));
    }
    if (view.position !== null && view.position < this.columns) {
      const left = (view.position * width) / this.columns;
      pen.strokeRect(left + 0.5, 0.5, Math.max(2, width / this.columns - 1), height - 1);
    }
  }
}

/** The colours of the current colour scheme, in a form that a canvas accepts. */
function schemeColours() {
  const probe = element("span");
  document.body.append(probe);
  const resolved = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const found = {
    surface: resolved("surface"), low: resolved("heat-low"), high: resolved("heat-high"),
    taken: resolved("taken"), text: resolved("text"),
  };
  probe.remove();
  return found;
}

// ---- the page

const sides = [];

function runs() {
  return data.prompts[view.prompt].runs;
}

function lastStep() {
  return Math.max(...runs().map((run) => run.nfe));
}

function draw() {
  const differing = new Set(differences(...runs()));
  for (const side of sides) side.draw(view.step, differing);
  byId("step").value = view.step;
  byId("step-text").textContent = `step ${view.step} of ${lastStep()}`;
  drawPosition();
}

function drawPosition() {
  const body = byId("position");
  const at = view.position;
  byId("position-title").textContent = at === null ? "Position: click on a token" : `Position ${at}`;
  body.replaceChildren(...sides.map((side) => {
    if (at === null) return row(side.policy.label, ["–", "–", "–", "–"]);
    const step = Math.min(view.step, side.run.nfe);
    const known = stateAfter(side.run, step).tokens.get(at);
    const seen = step > 0 ? side.predicted(step - 1, at) : null;
    return row(side.policy.label, [
      known ? piece(textOf(known.token)) : "masked or after the end",
      known ? `${known.step + 1}` : "–",
      known ? number(known.confidence, 3) : "–",
      seen ? `${textOf(seen.token)} at ${number(seen.confidence, 3)}` : "–",
    ]);
  }));
}

function showPrompt(index) {
  pause();
  const atEnd = view.step > 0 && view.step === lastStep();
  view.prompt = index;
  view.position = null;
  const prompt = data.prompts[index];
  byId("prompt").selectedIndex = index;
  byId("prompt-text").textContent = prompt.text;
  sides.forEach((side, i) => side.show(prompt.runs[i]));
  byId("step").max = lastStep();
  showVerdict(prompt.runs);
  showDifferences(prompt.runs);
  go(atEnd ? lastStep() : 0);
}

function showVerdict(pair) {
  const passes = pair.map((run) => run.nfe);
  const fewer = passes[0] < passes[1] ? 0 : 1;
  const more = 1 - fewer;
  byId("verdict").replaceChildren(breakable(passes[0] === passes[1]
    ? `Both take ${plural(passes[0], "forward pass")}.`
    : `${data.policies[fewer].label} takes ${plural(passes[fewer], "forward pass")}, ` +
      `${data.policies[more].label} ${passes[more]}: ${(passes[more] / passes[fewer]).toFixed(1)} ` +
      "times as many."));
}

function showDifferences(pair) {
  const found = differences(...pair);
  const longest = Math.max(...pair.map((run) => run.tokens.length));
  byId("differences-text").textContent = found.length === 0
    ? `Nowhere: both give the same ${plural(longest, "token")}.`
    : `At ${found.length} of ${plural(longest, "position")}.`;
  byId("differences-table").hidden = found.length === 0;
  const spans = [];
  for (const at of found) {
    const span = spans.at(-1);
    if (span && span[1] === at) span[1] = at + 1;
    else spans.push([at, at + 1]);
  }
  byId("differences").replaceChildren(...spans.map(([begin, end]) => row(
    end - begin === 1 ? `${begin}` : `${begin} to ${end - 1}`,
    pair.map((run) => {
      const text = run.tokens.slice(begin, end).map(textOf).join("");
      return text ? piece(text) : "after the end";
    }),
  )));
}

function showOverall() {
  const { compared } = data;
  const source = data.source.replaceAll("/", "/\u200b"); // a long path is wrapped at its slashes
  byId("overall-text").textContent =
    `${plural(compared, "prompt")} of ${source}, of which this page plays ` +
    `${data.prompts.length}, decoded again one at a time. Seconds are the total for all prompts.`;
  byId("overall").replaceChildren(...data.policies.map((policy) => row(policy.label, [
    percent(policy.validity), percent(policy.agreement), number(policy.nfe, 1),
    number(policy.tokens_per_forward, 2), number(policy.seconds, 2),
  ])));
  byId("configurations").replaceChildren(
    ...data.policies.map((policy) => element("li", policy.configuration)),
  );
  for (const policy of data.policies) {
    const head = element("th");
    head.append(breakable(policy.label));
    head.scope = "col";
    byId("differences-head").append(head);
  }
}

// ---- moving

function go(step) {
  view.step = Math.min(lastStep(), Math.max(0, step));
  draw();
}

function choose(position) {
  view.position = position;
  draw();
}

function pause() {
  clearInterval(view.timer);
  view.timer = null;
  byId("play").textContent = "Play";
}

function play() {
  if (view.step === lastStep()) go(0);
  byId("play").textContent = "Pause";
  view.timer = setInterval(() => {
    go(view.step + 1);
    if (view.step === lastStep()) pause();
  }, 1000 / Number(byId("speed").value));
}

function toggle() {
  if (view.timer === null) play();
  else pause();
}

function stepBy(count) {
  pause();
  go(view.step + count);
}

function nextPrompt(count) {
  showPrompt((view.prompt + count + data.prompts.length) % data.prompts.length);
}

const KEYS = {
  " ": toggle,
  ArrowLeft: () => stepBy(-1),
  ArrowRight: () => stepBy(1),
  Home: () => stepBy(-view.step),
  End: () => stepBy(lastStep()),
  ",": () => choose(Math.max(0, (view.position ?? 1) - 1)),
  ".": () => choose(Math.min(data.positions - 1, (view.position ?? -1) + 1)),
  n: () => nextPrompt(1),
  p: () => nextPrompt(-1),
};

document.addEventListener("keydown", (event) => {
  const { target } = event;
  const own = target.matches("select, input") || (event.key === " " && target.matches("button"));
  if (own || event.ctrlKey || event.metaKey || event.altKey || !(event.key in KEYS)) return;
  event.preventDefault();
  KEYS[event.key]();
});

byId("first").addEventListener("click", () => stepBy(-view.step));
byId("back").addEventListener("click", () => stepBy(-1));
byId("play").addEventListener("click", toggle);
byId("forward").addEventListener("click", () => stepBy(1));
byId("last").addEventListener("click", () => stepBy(lastStep()));
byId("step").addEventListener("input", (event) => { pause(); go(Number(event.target.value)); });
byId("prompt").addEventListener("change", (event) => showPrompt(event.target.selectedIndex));
byId("speed").addEventListener("change", () => {
  if (view.timer !== null) { pause(); play(); }
});

const THEMES = ["auto", "light", "dark"];
byId("theme").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme ?? "auto";
  const next = THEMES[(THEMES.indexOf(now) + 1) % THEMES.length];
  if (next === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  byId("theme").textContent = `Theme: ${next}`;
  repaint();
});

function repaint() {
  for (const side of sides) side.paint();
  draw();
}

darkScheme.addEventListener("change", repaint);
addEventListener("resize", repaint);

data.prompts.forEach((prompt, i) => {
  byId("prompt").append(element("option", `${i + 1}: ${prompt.text}`));
});
sides.push(new Side(0), new Side(1));
showOverall();
showPrompt(0);
