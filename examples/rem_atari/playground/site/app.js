// The page: what is shown, who plays, and what buttons and keys do.

import { Actions } from "./actions.js";
import { Link } from "./link.js";
import { drawStrip } from "./strip.js";
import { Tree } from "./tree.js";
import { drawReadout, drawScreen, dreamScreen, element, futureScreen, gameScreen } from "./view.js";

const $ = (selector) => document.querySelector(selector);
const PAUSE_MILLISECONDS = 700;
const RECORDED_AT_ONCE = 12;
const MANY = 6; // actions; more are named by arrows, in two columns

const tree = new Tree();
const state = { here: null, actor: "you", running: false, likely: false, tokens: false, compare: null, busy: false };
let about = null;
let actions = null;
let labels = null;

const link = new Link(hear, () => {
  stop();
  tell(`The connection is lost. Is the server still running (${about?.command ?? "rem-atari play"})? Then reload this page.`, true);
});

async function hear(words) {
  if (words.error) return tell(words.error, true);
  about = words;
  actions = new Actions(about.actions);
  labels = about.actions.length > MANY ? about.actions.map((_, action) => actions.glyph(action)) : about.actions;
  $("#policy").classList.toggle("many", about.actions.length > MANY);
  $("#game-name").textContent = about.game;
  document.title = `${about.game}: play in the dream`;
  $("#agent").textContent = about.agent;
  $("#speed").value = about.fps;
  $("#speed").dispatchEvent(new Event("input"));
  $("#hint").textContent = matchMedia("(pointer: coarse)").matches ? "Tap an action to take a step in both worlds." : `Press ${keysTold()} to take a step in both worlds.`;
  $("#keys").textContent = `Keys: ${keysTold()} act · Enter starts and stops the clock · , and . go back and forth · N new game · R dream from here · D dream it again · L most likely · T tokens · C compare`;
  $("#pad").replaceChildren(...actions.buttons().map(padButton));
  $("#pad").classList.toggle("flat", !actions.used.includes("up") && !actions.used.includes("down"));
  await ask({ do: "start" });
  if (about.recorded) await showRecorded(0);
  return undefined;
}

function keysTold() {
  const told = { left: "←", up: "↑", right: "→", down: "↓", fire: "space" };
  const inputs = actions.used.map((input) => told[input]);
  const own = actions.inputs.filter((inputs) => inputs === null).length;
  return [...inputs, ...(own ? [own > 1 ? `1 to ${Math.min(own, 9)}` : "1"] : [])].join(" ");
}

// Asks for a moment and goes there; what cannot be is told.
async function ask(request) {
  if (state.busy) return;
  state.busy = true;
  try {
    const { moment, oldest } = await link.ask(request);
    state.here = tree.add(moment, oldest).number;
    state.compare = null;
    tell("");
    draw();
  } catch (error) {
    stop();
    tell(error.message);
  } finally {
    state.busy = false;
  }
}

function tell(text, fatal = false) {
  const notice = $("#notice");
  notice.hidden = !text;
  notice.textContent = text;
  document.body.classList.toggle("lost", fatal);
}

// ---- Playing.

const step = (action, { at = state.here, anew = false } = {}) => ask({ do: "step", at, action, likely: state.likely, anew });
const here = () => tree.get(state.here);
const ended = ({ game, dream }) => (game ? game.over : dream.over);

async function press(action) {
  setActor("you");
  if (state.running) return;
  if (ended(here()) && here().dream.over) await ask({ do: "start" });
  else await step(action);
}

const chosen = () => (state.actor === "you" ? actions.current() : state.actor);

async function tick() {
  const { game, dream } = here();
  const stale = ended(here());
  if (stale || dream.over) {
    await wait(PAUSE_MILLISECONDS);
    if (state.running) await ask(stale ? { do: "start" } : { do: "look", at: state.here });
    return;
  }
  await step(chosen());
}

const wait = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

async function run() {
  while (state.running) {
    const began = performance.now();
    if (state.compare) replay();
    else await tick();
    await wait(Math.max(0, 1000 / Number($("#speed").value) - (performance.now() - began)));
  }
}

function start() {
  if (state.running) return;
  state.running = true;
  drawClock();
  run();
}

function stop() {
  state.running = false;
  drawClock();
}

function setActor(actor) {
  state.actor = actor;
  for (const button of document.querySelectorAll("#actor button")) {
    button.setAttribute("aria-checked", button.dataset.actor === actor);
  }
}

// ---- Time: going back, and comparing.

function go(number) {
  stop();
  state.compare = null;
  state.here = number;
  tree.choose(number);
  draw();
}

function move(by) {
  if (state.compare) return seek(state.compare.at + by);
  const story = tree.story();
  const place = story.indexOf(state.here) + by;
  if (story[place] !== undefined) go(story[place]);
  return undefined;
}

function seek(at) {
  const { first, second } = state.compare;
  state.compare.at = Math.max(0, Math.min(at, Math.max(first.length, second.length)));
  draw();
}

function replay() {
  const { at, first, second } = state.compare;
  seek(at === Math.max(first.length, second.length) ? 0 : at + 1);
}

function toggleCompare() {
  if (state.compare) return go(compared().first.number);
  const other = tree.otherFuture(state.here);
  if (other === null) return undefined;
  stop();
  state.compare = { ...tree.futures(tree.line(state.here).at(-1), other), at: 0 };
  return seek(1);
}

// The moments that are compared now; a future that is shorter stays at its end.
function compared() {
  const { at, fork, first, second } = state.compare;
  const moment = (future) => tree.get(at === 0 ? fork : future[Math.min(at, future.length) - 1]);
  return { first: moment(first), second: moment(second) };
}

function pick(number) {
  if (!state.compare) return go(number);
  const futures = tree.futures(state.compare.first.at(-1), number);
  if (futures && futures.second.length) state.compare = { ...futures, at: Math.max(1, state.compare.at) };
  return draw();
}

// ---- Drawing.

function draw() {
  document.body.classList.toggle("comparing", state.compare !== null);
  if (state.compare) drawCompared();
  else drawMoment();
  drawTime();
}

function drawMoment() {
  const moment = here();
  const screens = [gameScreen(moment), dreamScreen(moment)];
  ["#left", "#right"].forEach((side, index) => drawScreen($(side), screens[index], state.tokens));
  const taken = new Set(moment.action === null ? [] : [moment.action]);
  drawReadout(labels, { name: "game", view: alive(moment.game) }, { name: "dream", view: alive(moment.dream), dream: moment.dream }, taken);
}

function drawCompared() {
  const { first, second } = compared();
  const { at, first: one, second: two } = state.compare;
  drawScreen($("#left"), futureScreen(first, "Future A", second, at > one.length), state.tokens);
  drawScreen($("#right"), futureScreen(second, "Future B", first, at > two.length), state.tokens);
  drawReadout(labels, { name: "A", view: alive(first.dream), dream: first.dream }, { name: "B", view: alive(second.dream), dream: second.dream }, new Set());
}

// A side that is over expects nothing.
const alive = (side) => (side && !side.over ? side : null);

function drawTime() {
  const when = $("#when");
  const marks = { here: state.here, other: null };
  let story = tree.story();
  let told;
  if (state.compare) {
    const { first, second } = compared();
    const length = Math.max(state.compare.first.length, state.compare.second.length);
    [when.max, when.value] = [length, state.compare.at];
    Object.assign(marks, { here: first.number, other: second.number });
    told = `${state.compare.at} of ${length} steps since the futures part`;
  } else {
    [when.max, when.value] = [story.length - 1, story.indexOf(state.here)];
    const { step: number, action } = here();
    told = `step ${number}${action === null ? "" : `: ${about.actions[action]}`}`;
  }
  const other = state.compare ? null : tree.otherFuture(state.here);
  $("#again").disabled = state.compare || tree.get(here().parent) === undefined;
  $("#look").disabled = state.compare || !alive(here().game);
  $("#compare").disabled = !state.compare && other === null;
  $("#compare").setAttribute("aria-pressed", state.compare !== null);
  const branched = story.length < tree.moments.size;
  $("#time-told").textContent = `${told}. ${branched ? "Below the story: the futures that branch off." : "Go back to any moment and act otherwise: the dream branches."}`;
  drawStrip($("#strip"), tree, story, marks, pick);
}

function drawClock() {
  $("#clock span").textContent = state.running ? "Pause" : "Play";
  $("#clock").classList.toggle("on", state.running);
}

// ---- Recorded frames and films.

async function showRecorded(first) {
  const { frames } = await link.ask({ do: "frames", first, count: RECORDED_AT_ONCE });
  $("#recorded").hidden = false;
  $("#row").max = Math.max(0, about.recorded - RECORDED_AT_ONCE);
  $("#row").value = first;
  $("#row-told").textContent = `${first + 1} to ${first + frames.length} of ${about.recorded}`;
  $("#frames").replaceChildren(...frames.map((frame, place) => {
    const button = element("button", { type: "button", title: `frame ${first + place + 1}` }, element("img", { className: "pixels", src: frame, alt: "" }));
    button.onclick = () => {
      stop();
      ask({ do: "start_at", index: first + place });
    };
    return button;
  }));
}

async function saveFilm(format) {
  stop();
  tell("Making the film …");
  try {
    const at = state.compare ? compared().first.number : state.here;
    const { name, data } = await link.ask({ do: "film", at, format });
    const address = URL.createObjectURL(new Blob([data]));
    element("a", { href: address, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(address), 60_000);
    tell("");
  } catch (error) {
    tell(error.message);
  }
}

// ---- Buttons and keys.

function padButton({ input, action, label, place }) {
  const button = element("button", { type: "button", className: place, textContent: label });
  button.onpointerdown = (event) => {
    event.preventDefault();
    if (input) actions.held.add(input);
    press(input ? actions.current() : action);
  };
  button.onpointerup = button.onpointerleave = button.onpointercancel = () => actions.held.delete(input);
  button.onkeydown = (event) => {
    if (event.code === "Enter") press(input ? actions.names.indexOf(input) : action);
  };
  return button;
}

function toggle(name) {
  state[name] = !state[name];
  $(`#${name}`).setAttribute("aria-pressed", state[name]);
  draw();
}

const act = {
  clock: () => (state.running ? stop() : start()),
  step: () => { stop(); if (ended(here()) && here().dream.over) ask({ do: "start" }); else step(chosen()); },
  new: () => { stop(); ask({ do: "start" }); },
  again: () => { stop(); step(here().action, { at: here().parent, anew: true }); },
  look: () => ask({ do: "look", at: state.here }),
  likely: () => toggle("likely"),
  tokens: () => toggle("tokens"),
  compare: toggleCompare,
  back: () => move(-1),
  forward: () => move(1),
};
for (const [name, does] of Object.entries(act)) $(`#${name}`).onclick = does;
for (const button of document.querySelectorAll("#actor button")) button.onclick = () => setActor(button.dataset.actor);
for (const button of document.querySelectorAll("[data-film]")) button.onclick = () => saveFilm(button.dataset.film);
$("#speed").oninput = () => { $("#speed-told").textContent = `${$("#speed").value} a second`; };
$("#when").oninput = () => {
  const value = Number($("#when").value);
  if (state.compare) seek(value);
  else go(tree.story()[value]);
};
$("#row").onchange = () => showRecorded(Number($("#row").value));
window.onresize = () => state.here !== null && draw();

const LETTERS = { Enter: "clock", Comma: "back", Period: "forward", KeyN: "new", KeyR: "look", KeyD: "again", KeyL: "likely", KeyT: "tokens", KeyC: "compare" };

document.onkeydown = (event) => {
  if (!actions || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input[type=range]") && event.code.startsWith("Arrow")) return;
  if (event.target.matches("button") && ["Enter", "Space"].includes(event.code)) return;
  const input = actions.inputOf(event.code);
  const numbered = actions.numbered(event.key);
  if (input) actions.held.add(input);
  if (input) press(actions.current());
  else if (numbered !== null) press(numbered);
  else if (LETTERS[event.code] && !event.repeat) $(`#${LETTERS[event.code]}`).click();
  else return;
  event.preventDefault();
};
document.onkeyup = (event) => actions?.held.delete(actions.inputOf(event.code));
window.onblur = () => actions?.held.clear();
setActor("you");
