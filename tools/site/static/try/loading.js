// Loads files that build.py compressed, and tells how far it is.

/** What the build says of the files and of what they hold. */
export async function facts() {
  return JSON.parse(new TextDecoder().decode(await bytes("files.json")));
}

/**
 * Load files of a group and unpack them.
 * @param {Object<string, number>} sizes bytes to load, by name
 * @param {(share: number) => void} tell called with the share that has arrived, 0 to 1
 * @returns {Promise<Object<string, Uint8Array>>} by name
 */
export async function load(sizes, tell) {
  const total = Object.values(sizes).reduce((sum, size) => sum + size, 0);
  let arrived = 0;
  const count = (size) => tell(Math.min((arrived += size) / total, 1));
  const files = Object.keys(sizes).map(async (name) => [name, await unpacked(await bytes(`${name}.gz`, count))]);
  return Object.fromEntries(await Promise.all(files));
}

async function bytes(name, count = () => {}) {
  const response = await fetch(new URL(name, import.meta.url));
  if (!response.ok) throw new Error(`${name}: the server answered ${response.status}`);
  const parts = [];
  for (let reader = response.body.getReader(), part; !(part = await reader.read()).done; ) {
    parts.push(part.value);
    count(part.value.length);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

async function unpacked(data) {
  if (data[0] !== 0x1f || data[1] !== 0x8b) return data; // some hosts let the browser unpack such files
  const stream = new Blob([data]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
