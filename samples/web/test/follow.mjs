/**
 * Feed `ids`, then each of `tokens`, whatever the model says, and report what it says.
 *
 * @returns For each of `tokens`, the most likely token in its place, and the difference of the two best logits there.
 */
export async function follow(bundle, ids, tokens) {
  const best = [];
  const gaps = [];
  const choose = (logits) => {
    let [first, second] = logits[1] > logits[0] ? [1, 0] : [0, 1];
    for (let i = 2; i < logits.length; i++)
      if (logits[i] > logits[first]) [first, second] = [i, first];
      else if (logits[i] > logits[second]) second = i;
    best.push(first);
    gaps.push(logits[first] - logits[second]);
    return tokens[best.length - 1];
  };
  for await (const _ of bundle.generate(ids, tokens.length, choose));
  return { best, gaps };
}
