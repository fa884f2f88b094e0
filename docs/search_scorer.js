// How Sphinx' search orders its results: pages before the API and the table of all settings, and among pages first those
// whose title has most of the words that were typed. The numbers below `score` are Sphinx' own.
const wordsOf = (text) => text.toLowerCase().split(/\W+/).filter(Boolean);

var Scorer = {
  score: ([page, title, , , score]) => {
    const asked = wordsOf(new URLSearchParams(location.search).get("q") ?? "");
    const words = wordsOf(title);
    const share = words.filter((word) => asked.includes(word)).length / words.length;
    return score + 10 * share - (/^(api\/|settings-reference$)/.test(page) ? 100 : 0);
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
