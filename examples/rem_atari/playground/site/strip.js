// The strip of moments around the present one: the story as columns, and below it the futures that branch off.

import { element } from "./view.js";

const COLUMN = 52;
const MOST_LANES = 4;

// pick(number): a moment was chosen. marks: {here, other}.
export function drawStrip(strip, tree, story, marks, pick) {
  const room = Math.max(5, Math.floor(strip.clientWidth / COLUMN));
  const here = Math.max(0, story.indexOf(marks.here));
  const first = Math.max(0, Math.min(here - Math.floor(room / 2), story.length - room));
  const shown = ({ column, line }) => column < first + room && column + line.length > first;
  const lanes = [{ column: 0, line: story }, ...tree.branches(story).filter(shown).sort((a, b) => distance(a) - distance(b)).slice(0, MOST_LANES)];
  function distance({ column }) {
    return Math.abs(column - here);
  }
  strip.replaceChildren(...lanes.map(({ column, line }, lane) => {
    const cells = [];
    for (let place = first; place < first + room; place += 1) {
      const number = line[place - column];
      cells.push(number === undefined || place < column ? element("span") : cell(tree.get(number), lane > 0 && place === column));
    }
    return element("div", { className: lane ? "lane branch" : "lane" }, ...cells);
  }));

  function cell(moment, isFork) {
    const { dream, game } = moment;
    const classes = ["moment"];
    if (moment.number === marks.here) classes.push("here");
    if (moment.number === marks.other) classes.push("other");
    if (moment.step === 0) classes.push("start");
    if (isFork) classes.push("fork");
    if (dream.steps === 0) classes.push("seen");
    const stands = dream.steps > 0 && dream.end_chance === null;
    if (stands) classes.push("stands");
    const reward = dream.over && !stands ? "end" : Math.sign(dream.reward);
    const button = element("button", { type: "button", className: classes.join(" "), title: `step ${moment.step}` },
      element("img", { className: "pixels", src: (game ?? dream).frame, alt: "" }),
      element("img", { className: "pixels", src: dream.frame, alt: "" }),
      element("i", { className: `mark r${reward}` }));
    button.onclick = () => pick(moment.number);
    return button;
  }
}
