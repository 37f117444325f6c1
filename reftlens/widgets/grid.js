// Shows one strength at a time; where no script runs, all of them stay visible.
document.querySelectorAll(".reftlens-grid[data-strengths]:not([data-live])").forEach(function (grid) {
  const input = grid.querySelector("input"), output = grid.querySelector("output");
  const strengths = JSON.parse(grid.dataset.strengths);
  function show() {
    const at = strengths[input.value];
    output.textContent = at;
    input.setAttribute("aria-valuetext", "strength " + at);
    grid.querySelectorAll("[data-at]").forEach(function (cell) { cell.hidden = cell.dataset.at !== input.value; });
  }
  grid.dataset.live = "";
  grid.querySelector(".reftlens-dial").hidden = false;
  input.addEventListener("input", show);
  show();
});
