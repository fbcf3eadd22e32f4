// One file of an app's modules (rolldown), and a component of that file (componentize-js).
// node componentize.mjs ENTRY WIT WORLD OUTPUT; what went wrong is on stderr, the exit code is 1 then.

import { writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { componentize } from "@bytecodealliance/componentize-js";
import { rolldown } from "rolldown";

const [entry, wit, world, output] = process.argv.slice(2);
const bundled = join(dirname(output), "bundled.js");
const missing = [];

try {
  const app = await rolldown({
    input: entry,
    // The interfaces of the world are the engine's; there is no Node.js, nor a browser's page.
    external: /^wasi:/,
    platform: "neutral",
    resolve: { mainFields: ["module", "main"], conditionNames: ["import", "default"] },
    // What is not found would be an import that is left to whoever runs this, and nobody does.
    onLog: (level, log) => (log.code === "UNRESOLVED_IMPORT" ? missing.push(log.message) : undefined),
  });
  await app.write({ file: bundled, format: "esm", codeSplitting: false });
  if (missing.length > 0) {
    throw new Error(missing.join("\n"));
  }
  const { component } = await componentize({ sourcePath: bundled, witPath: wit, worldName: world });
  await writeFile(output, component);
} catch (error) {
  console.error(error.message);
  process.exit(1);
}
