"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // --- table: each heading sorts; a third press brings back the order of the run ---
  const table = document.querySelector("#results");
  const body = table.tBodies[0];
  const inOrder = [...body.rows];
  const opposite = { ascending: "descending", descending: "ascending" };

  const valueOf = (row, column) => row.cells[column].dataset.value;

  function sortBy(column, direction) {
    const sign = direction === "ascending" ? 1 : -1;
    const rows = [...inOrder];
    if (direction) {
      rows.sort((a, b) => {
        const [x, y] = [valueOf(a, column), valueOf(b, column)];
        // What was not measured stays at the end, whichever way the rest is sorted.
        if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
        return sign * (column === 0 ? x.localeCompare(y, "en", { numeric: true }) : x - y);
      });
    }
    body.append(...rows);
  }

  for (const heading of all("thead th:not([data-fixed])", table)) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const first = heading.dataset.first;
      const now = heading.getAttribute("aria-sort");
      const next = now === null ? first : now === first ? opposite[first] : null;
      for (const other of all("thead th", table)) other.removeAttribute("aria-sort");
      if (next) heading.setAttribute("aria-sort", next);
      sortBy(heading.cellIndex, next);
    });
  }

  // --- pictures ---
  const tools = document.querySelector(".tools");
  if (!tools) return;
  tools.hidden = false;
  tools.addEventListener("submit", (event) => event.preventDefault());
  const list = document.querySelector("#scenes");
  const scenes = all(".scene", list);
  const shotOf = (scene, recipe) =>
    all(".shot", scene).find((shot) => shot.dataset.recipe === recipe);
  const imageOf = (scene, recipe) => shotOf(scene, recipe)?.querySelector("img");

  // Equal pictures are embedded once; the others borrow the bytes here.
  for (const shot of all(".shot[data-same]", list)) {
    shot.querySelector("img").src = imageOf(shot.closest(".scene"), shot.dataset.same).src;
  }

  const shown = () =>
    new Set(all("[name=show]:checked", tools).map((box) => box.value));

  function moveDivider(scene, percent) {
    const range = scene.querySelector(".compare input");
    const value = Math.min(100, Math.max(0, Math.round(percent)));
    range.value = value;
    range.setAttribute("aria-valuetext", `${value} % baseline`);
    scene.querySelector(".stage").style.setProperty("--split", `${value}%`);
  }

  function compareWith(scene, recipe) {
    const compare = scene.querySelector(".compare");
    const before = imageOf(scene, "baseline");
    const after = recipe && imageOf(scene, recipe);
    compare.hidden = !(before && after);
    scene.dataset.compared = compare.hidden ? "" : recipe;
    for (const button of all(".shot button", scene)) {
      const chosen = !compare.hidden && button.closest(".shot").dataset.recipe === recipe;
      button.setAttribute("aria-pressed", String(chosen));
    }
    if (compare.hidden) return;
    const number = scene.querySelector(".number").textContent;
    compare.querySelector(".before").src = before.src;
    compare.querySelector(".before").alt = before.alt;
    compare.querySelector(".after").src = after.src;
    compare.querySelector(".after").alt = after.alt;
    compare.querySelector(".tag.right").textContent = recipe;
    compare
      .querySelector("input")
      .setAttribute("aria-label", `Prompt ${number}: divider between baseline and ${recipe}`);
  }

  function startComparison(scene) {
    const stage = scene.querySelector(".stage");
    const range = scene.querySelector(".compare input");
    const follow = (event) => {
      const box = stage.getBoundingClientRect();
      moveDivider(scene, ((event.clientX - box.left) / box.width) * 100);
    };
    stage.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      stage.setPointerCapture(event.pointerId);
      follow(event);
    });
    stage.addEventListener("pointermove", (event) => {
      if (stage.hasPointerCapture(event.pointerId)) follow(event);
    });
    range.addEventListener("input", () => moveDivider(scene, range.valueAsNumber));
    for (const shot of all(".shot", scene)) {
      const button = shot.querySelector("button");
      if (!button) continue;
      button.disabled = shot.dataset.recipe === "baseline";
      button.addEventListener("click", () => compareWith(scene, shot.dataset.recipe));
    }
    moveDivider(scene, 50);
  }

  function worst(scene, recipes) {
    const values = all(".shot[data-lpips]", scene)
      .filter((shot) => recipes.has(shot.dataset.recipe))
      .map((shot) => Number(shot.dataset.lpips));
    return Math.max(-1, ...values);
  }

  function order() {
    const recipes = shown();
    const sorted = [...scenes];
    if (tools.elements.order.value === "worst") {
      sorted.sort((a, b) => worst(b, recipes) - worst(a, recipes));
    }
    list.append(...sorted);
  }

  function show() {
    const recipes = shown();
    for (const shot of all(".shot", list)) {
      const recipe = shot.dataset.recipe;
      shot.hidden = recipe !== "baseline" && !recipes.has(recipe);
    }
    const choice = tools.elements.compare;
    if (choice) {
      for (const option of choice.options) {
        option.disabled = option.hidden = !recipes.has(option.value);
      }
      if (!recipes.has(choice.value)) choice.value = [...recipes][0] ?? "";
      for (const scene of scenes) {
        if (!recipes.has(scene.dataset.compared)) compareWith(scene, choice.value);
      }
    }
    order();
  }

  for (const box of all("[name=show]", tools)) box.addEventListener("change", show);
  tools.elements.order.addEventListener("change", order);
  if (tools.elements.compare) {
    tools.elements.compare.addEventListener("change", (event) => {
      for (const scene of scenes) compareWith(scene, event.target.value);
    });
    for (const scene of scenes) startComparison(scene);
  }
  show();
})();
