// Steps every film of the page together. Without it the films show their start, and the charts below each film
// still show every step.
const player = document.querySelector(".player");
if (player) {
  const button = player.querySelector("button");
  const slider = player.querySelector("input");
  const label = player.querySelector("output");
  const films = [...document.querySelectorAll(".film")].map((film) => ({
    screen: film.querySelector(".screen"),
    frames: Number(film.dataset.frames),
    captions: JSON.parse(film.dataset.captions),
    happened: film.querySelector(".happened"),
    chances: film.querySelector(".chances"),
    marks: film.querySelectorAll(".here"),
  }));
  const last = Number(slider.max);
  const stepMilliseconds = 450;
  const pauseMilliseconds = 1800;
  let timer = null;

  function show(step) {
    slider.value = step;
    label.textContent = step === 0 ? `start, of ${last}` : `step ${step} of ${last}`;
    for (const film of films) {
      const frame = Math.min(step, film.frames - 1);
      const place = film.frames > 1 ? (100 * frame) / (film.frames - 1) : 0;
      film.screen.style.backgroundPosition = `${place}% 0`;
      film.screen.classList.toggle("over", step >= film.frames);
      const [happened, chances] = film.captions[Math.min(step, film.captions.length - 1)];
      film.happened.textContent = happened;
      film.chances.textContent = chances;
      film.marks.forEach((mark, index) => mark.classList.toggle("on", index === step - 1));
    }
  }

  function play() {
    const step = Number(slider.value);
    show(step === last ? 0 : step + 1);
    timer = setTimeout(play, Number(slider.value) === last ? pauseMilliseconds : stepMilliseconds);
  }

  function pause() {
    clearTimeout(timer);
    timer = null;
    button.textContent = "Play";
  }

  function start() {
    button.textContent = "Pause";
    play();
  }

  button.addEventListener("click", () => (timer === null ? start() : pause()));
  slider.addEventListener("input", () => {
    pause();
    show(Number(slider.value));
  });
  document.documentElement.classList.add("ready");
  show(0);
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) start();
  else pause();
}
