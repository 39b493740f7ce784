// Where a patch looks: attention weights that the library computed beforehand.

import { load } from "./loading.js";

/** Load the maps and their pictures; `tell` gets the share that has arrived. */
export async function loadMaps({ sizes, scenes, grid, blocks, heads }, tell) {
  const { maps, ...pictures } = await load(sizes.maps, tell);
  const weights = Float32Array.from(new Uint16Array(maps.buffer), (x) => x / 65535);
  const patches = grid[0] * grid[1], pooling = scenes.length * blocks * heads * patches * patches;
  const images = scenes.map((_, i) => createImageBitmap(new Blob([pictures[`scene${i}`]], { type: "image/png" })));

  /** Weights of one head for what patch `query` asks in a block; block `blocks` is the pooling head's one query. */
  function ofHead(scene, block, head, query) {
    const place = block === blocks
      ? pooling + (scene * heads + head) * patches
      : (((scene * blocks + block) * heads + head) * patches + query) * patches;
    return weights.subarray(place, place + patches);
  }

  /** The same, or the heads' mean where head is -1. */
  function weightsOf(scene, block, head, query) {
    if (head >= 0) return ofHead(scene, block, head, query);
    const all = Array.from({ length: heads }, (_, i) => ofHead(scene, block, i, query));
    return all[0].map((_, patch) => all.reduce((sum, one) => sum + one[patch], 0) / heads);
  }

  return { images: await Promise.all(images), weightsOf };
}
