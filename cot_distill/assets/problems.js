"use strict";
const form = document.querySelector(".filters");
const problems = [...document.querySelectorAll(".problem")];
const texts = problems.map((problem) => problem.textContent.toLowerCase());
const count = document.querySelector("#count");
function filter() {
  const words = form.querySelector("#words").value.toLowerCase().split(/\s+/).filter(Boolean);
  const choices = [...form.querySelectorAll("select")].filter((select) => select.value);
  let shown = 0;
  problems.forEach((problem, i) => {
    const outcomes = JSON.parse(problem.dataset.outcomes);
    const fits = words.every((word) => texts[i].includes(word)) &&
      choices.every((select) => outcomes[select.dataset.variant] === undefined ? false :
        select.value === "wrong" ? outcomes[select.dataset.variant] !== "right" : outcomes[select.dataset.variant] === select.value);
    problem.hidden = !fits;
    shown += fits;
  });
  count.textContent = `${shown} of ${problems.length} problems`;
}
form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
form.hidden = false;
filter();
