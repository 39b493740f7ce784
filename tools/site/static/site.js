// A formula that is wider than the page scrolls inside; then the keyboard must reach it, to scroll it by arrow keys.
const reachable = () => {
  for (const formula of document.querySelectorAll('mjx-container[display="true"]')) {
    if (formula.scrollWidth > formula.clientWidth) formula.tabIndex = 0;
    else formula.removeAttribute("tabindex");
  }
};
addEventListener("load", () => window.MathJax?.startup.promise.then(reachable));
addEventListener("resize", reachable);
