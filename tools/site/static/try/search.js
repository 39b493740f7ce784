// Pictures that fit a text: the text tower, run by ONNX Runtime, and the pictures' vectors.

import { load } from "./loading.js";
import { Tokenizer } from "./tokenizer.js";

/** Load all that a search needs; `tell` gets the share that has arrived. */
export async function loadSearch({ sizes, names, width, context, unseen }, tell) {
  const { script, ...packed } = sizes.search;
  const [files, ort] = await Promise.all([load(packed, tell), import("./ort.mjs")]);
  ort.env.wasm.numThreads = 1; // more would need headers that many hosts of static pages don't send
  ort.env.wasm.wasmBinary = files.runtime;
  const session = await ort.InferenceSession.create(files.model);
  const tokenizer = new Tokenizer(JSON.parse(new TextDecoder().decode(files.tokenizer)), context);
  const vectors = Float32Array.from(new Int16Array(files.vectors.buffer), (x) => x / 32767);
  const sheet = URL.createObjectURL(new Blob([files.sheet], { type: "image/png" }));
  let turn = Promise.resolve(); // a session runs one text at a time

  /** The unit vector of a text. */
  async function embed(text) {
    const ids = BigInt64Array.from(tokenizer.encode(text), BigInt);
    const run = () => session.run({ tokens: new ort.Tensor("int64", ids, [1, context]) });
    turn = turn.then(run, run);
    return (await turn).vector.data;
  }

  /** The `count` pictures of the largest cosine with a text, the best one first. */
  async function find(text, count) {
    const vector = await embed(text);
    const cosines = names.map((_, place) => {
      const picture = vectors.subarray(place * width, (place + 1) * width);
      return picture.reduce((sum, x, i) => sum + x * vector[i], 0);
    });
    const order = cosines.map((_, place) => place).sort((a, b) => cosines[b] - cosines[a]);
    return order.slice(0, count).map((place) => ({
      place, name: names[place], cosine: cosines[place], unseen: place >= names.length - unseen,
    }));
  }

  return { tokenizer, embed, find, sheet };
}
