// What the theme leaves out: the page's notebook is saved instead of shown, and the keyboard reaches formulas that scroll.

document.addEventListener("DOMContentLoaded", async () => {
    document.querySelector(".btn-download-source-button")?.setAttribute("download", "");
    await window.MathJax?.startup?.promise;
    for (const formula of document.querySelectorAll("mjx-container[display]")) {
        if (formula.scrollWidth > formula.clientWidth) formula.tabIndex = 0;
    }
});
