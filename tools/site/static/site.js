// A formula that is wider than the page scrolls inside; then the keyboard must reach it, to scroll it by arrow keys.
const reachable = () => {
  for (const formula of document.querySelectorAll('mjx-container[display="true"]')) {
    if (formula.scrollWidth > formula.clientWidth) formula.tabIndex = 0;
    else formula.removeAttribute("tabindex");
  }
};
addEventListener("load", () => window.MathJax?.startup.promise.then(reachable));
addEventListener("resize", reachable);

// A picture that is shown smaller than it is, as on a phone, leads to the whole of it.
const enlargeable = () => {
  for (const picture of document.querySelectorAll(".cell_output img:not(.still img, a.larger img)")) {
    const shown = picture.clientWidth;
    if (shown === 0 || shown >= picture.naturalWidth) continue; // 0 in a closed answer
    const link = document.createElement("a");
    link.href = picture.src;
    link.className = "larger";
    picture.replaceWith(link);
    link.append(picture);
  }
};
addEventListener("load", enlargeable);
addEventListener("resize", enlargeable);
document.addEventListener("toggle", enlargeable, true); // an answer that opens

// A search quotes a page's text, without the menus that stand around it.
if (typeof Search !== "undefined") {
  const toText = Search.htmlToText;
  Search.htmlToText = (html, anchor) => {
    const page = new DOMParser().parseFromString(html, "text/html");
    for (const menu of page.querySelectorAll(".bd-header-article, .bd-sidebar-secondary, #jb-print-docs-body")) menu.remove();
    return toText(page.documentElement.outerHTML, anchor);
  };
}
