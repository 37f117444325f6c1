// What axe-core finds in the theme: a search without a name, and boxes that scroll and cannot be reached by keyboard.
window.addEventListener("load", () => {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  const scrolls = "pre > code, .md-typeset__scrollwrap, .highlight-ipynb, .jp-OutputArea-output, .jp-OutputArea-output pre";
  document.querySelectorAll(scrolls).forEach(box => box.setAttribute("tabindex", "0"));
});
