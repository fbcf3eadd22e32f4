// Greets whom its arguments name (or the world); the environment may say how.

const greeting = process.env.has("GREETING") ? process.env.get("GREETING") : "Hello";

if (process.argv.length < 2) {
  console.log(`${greeting}, World, from TypeScript!`);
}
for (let i = 1; i < process.argv.length; i++) {
  console.log(`${greeting}, ${process.argv[i]}, from TypeScript!`);
}
