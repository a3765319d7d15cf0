// What a report's page does beyond showing: themes, differences to the base, zooming side by side.
(() => {
  "use strict";
  const root = document.documentElement;
  root.classList.add("script");

  // Themes: as the system says, or by choice, which is remembered where the browser allows it.
  const themes = ["auto", "light", "dark"];
  const themeButton = document.getElementById("theme");
  const remember = (value) => {
    try {
      if (value !== undefined) localStorage.setItem("pared-theme", value);
      return localStorage.getItem("pared-theme");
    } catch {
      return null;
    }
  };
  const setTheme = (theme) => {
    if (theme === "auto") delete root.dataset.theme;
    else root.dataset.theme = theme;
    themeButton.textContent = `Theme: ${theme}`;
  };
  const chosen = remember() ?? root.dataset.theme;
  let theme = themes.includes(chosen) ? chosen : "auto";
  setTheme(theme);
  themeButton.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    setTheme(theme);
    remember(theme);
  });

  const shots = [...document.querySelectorAll(".shot")];
  if (!shots.length) return;

  // The pictures as a grid: arms by rows. The first arm is the base.
  const arms = [...new Set(shots.map((shot) => shot.dataset.arm))];
  const rows = [...new Set(shots.map((shot) => shot.dataset.row))];
  const find = (row, arm) =>
    shots.find((shot) => shot.dataset.row === rows[row] && shot.dataset.arm === arms[arm]);
  const source = (row, arm) => find(row, arm).querySelector("img:not(.over)").src;

  // Difference: the base's picture laid over each, blended by its difference, four times as bright.
  const overlay = (row) => {
    const image = new Image();
    image.src = source(row, 0);
    image.alt = "";
    image.className = "over";
    return image;
  };
  const showDifference = (on) => {
    for (const shot of shots) {
      if (on && shot.dataset.arm === arms[0]) continue;
      shot.querySelector(".over")?.remove();
      shot.classList.toggle("difference", on);
      if (on) shot.append(overlay(rows.indexOf(shot.dataset.row)));
    }
  };
  const switches = [...document.querySelectorAll("[data-show]")];
  for (const button of switches) {
    button.addEventListener("click", () => {
      for (const other of switches) other.setAttribute("aria-pressed", String(other === button));
      showDifference(button.dataset.show === "difference");
    });
  }

  // Zooming: base and one arm side by side, moved and magnified together.
  const dialog = document.createElement("dialog");
  dialog.setAttribute("aria-label", "Pictures side by side");
  dialog.innerHTML = `
    <div class="zoom-head"><p aria-live="polite"></p>
      <button type="button" data-do="left">← arm</button>
      <button type="button" data-do="right">arm →</button>
      <button type="button" data-do="up">↑ picture</button>
      <button type="button" data-do="down">picture ↓</button>
      <button type="button" data-do="out" aria-label="Smaller">−</button>
      <button type="button" data-do="in" aria-label="Larger">+</button>
      <button type="button" data-do="difference" aria-pressed="false">Difference</button>
      <button type="button" data-do="close">Close</button></div>
    <div class="panes">
      <div class="pane"><b></b><div class="plane"><img alt=""></div></div>
      <div class="pane"><b></b><div class="plane"><img alt=""></div></div></div>
    <div class="zoom-foot">Left and right: other arm. Up and down: other picture. Wheel or + and −:
      zoom. Drag: move. D: difference. Hold B: the base in both places.</div>`;
  document.body.append(dialog);
  const [caption, panes] = [dialog.querySelector("p"), [...dialog.querySelectorAll(".pane")]];
  const planes = [...dialog.querySelectorAll(".plane")];
  const tiny = Boolean(document.querySelector(".shots.tiny"));
  for (const plane of planes) plane.classList.toggle("tiny", tiny);
  const state = { row: 0, arm: 1, scale: 1, x: 0, y: 0, difference: false, base: false };

  const place = () => {
    const move = `translate(${state.x}px, ${state.y}px) scale(${state.scale})`;
    for (const plane of planes) plane.style.transform = move;
  };
  const draw = () => {
    const shown = [0, state.base ? 0 : state.arm];
    planes.forEach((plane, side) => {
      plane.querySelector(".over")?.remove();
      const image = plane.querySelector("img");
      image.src = source(state.row, shown[side]);
      image.alt = find(state.row, shown[side]).querySelector("img").alt;
      panes[side].querySelector("b").textContent = arms[shown[side]];
      const differs = state.difference && side === 1 && !state.base;
      plane.classList.toggle("difference", differs);
      if (differs) plane.append(overlay(state.row));
    });
    caption.textContent = `${find(state.row, 0).dataset.prompt} (${state.row + 1} of ${rows.length})`;
    dialog
      .querySelector("[data-do=difference]")
      .setAttribute("aria-pressed", String(state.difference));
    place();
  };
  const zoom = (factor, x, y) => {
    const box = panes[0].getBoundingClientRect();
    const [px, py] = [x ?? box.width / 2, y ?? box.height / 2];
    const scale = Math.min(40, Math.max(1, state.scale * factor));
    // The point under the pointer stays where it is.
    state.x = px - ((px - state.x) * scale) / state.scale;
    state.y = py - ((py - state.y) * scale) / state.scale;
    state.scale = scale;
    if (scale === 1) state.x = state.y = 0;
    place();
  };
  const turn = (name, by, count, from) => {
    state[name] = from + ((state[name] - from + by + count - from) % (count - from));
    draw();
  };
  // With the base alone there is no other arm to turn to.
  const firstArm = arms.length > 1 ? 1 : 0;
  const deeds = {
    left: () => turn("arm", -1, arms.length, firstArm),
    right: () => turn("arm", 1, arms.length, firstArm),
    up: () => turn("row", -1, rows.length, 0),
    down: () => turn("row", 1, rows.length, 0),
    in: () => zoom(1.5),
    out: () => zoom(1 / 1.5),
    difference: () => { state.difference = !state.difference; draw(); },
    close: () => dialog.close(),
  };
  const keys = {
    ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down",
    "+": "in", "=": "in", "-": "out", d: "difference",
  };
  for (const shot of shots) {
    shot.addEventListener("click", () => {
      const arm = arms.indexOf(shot.dataset.arm);
      Object.assign(state, { row: rows.indexOf(shot.dataset.row), scale: 1, x: 0, y: 0 });
      state.arm = Math.max(arm, firstArm);
      draw();
      dialog.showModal();
    });
  }
  for (const button of dialog.querySelectorAll("[data-do]")) {
    button.addEventListener("click", () => deeds[button.dataset.do]());
  }
  dialog.addEventListener("keydown", (event) => {
    if (event.key in keys) {
      event.preventDefault();
      deeds[keys[event.key]]();
    } else if (event.key === "b" && !state.base) {
      state.base = true;
      draw();
    }
  });
  dialog.addEventListener("keyup", (event) => {
    if (event.key !== "b") return;
    state.base = false;
    draw();
  });
  for (const pane of panes) {
    pane.addEventListener("wheel", (event) => {
      event.preventDefault();
      const box = pane.getBoundingClientRect();
      zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2, event.clientX - box.left, event.clientY - box.top);
    }, { passive: false });
    pane.addEventListener("pointerdown", (event) => pane.setPointerCapture(event.pointerId));
    pane.addEventListener("pointermove", (event) => {
      if (!pane.hasPointerCapture(event.pointerId)) return;
      state.x += event.movementX;
      state.y += event.movementY;
      place();
    });
  }
})();
