// Sets the chosen theme before the first paint; "auto" follows the system.
(function () {
  let theme = null;
  try {
    theme = localStorage.getItem("omni-engine.theme");
  } catch {
    // No storage: the system decides.
  }
  if (theme === "light" || theme === "dark") {
    document.documentElement.dataset.theme = theme;
  }
})();
