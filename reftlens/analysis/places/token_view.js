// Shows the layers of one token at a time; where no script runs, those of all tokens stay visible.
document.querySelectorAll(".reftlens-tokens:not([data-live])").forEach(function (view) {
  const panels = view.querySelectorAll("[data-token]");
  function show() {
    const at = view.querySelector("input:checked").value;
    panels.forEach(function (panel) { panel.hidden = panel.dataset.token !== at; });
  }
  view.dataset.live = "";
  view.addEventListener("change", show);
  show();
});
