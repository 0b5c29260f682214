// Schemas as zod's users make them: `npm install zod zod-to-json-schema && node from_zod.mjs 4 > zod.json`,
// and `node from_zod.mjs 3 > zod-to-json-schema.json` by zod-to-json-schema from zod's older form.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const require = createRequire(process.cwd() + "/");
const four = process.argv[2] === "4";
const z = require(four ? "zod" : "zod/v3").z;
const { zodToJsonSchema } = require("zod-to-json-schema");
const version = (name) => `${name} ${JSON.parse(readFileSync(`node_modules/${name}/package.json`)).version}`;

const user = z.object({ name: z.string(), age: z.number().int().positive() });
const cat = z.object({ kind: z.literal("cat"), lives: z.number().int() });
const dog = z.object({ kind: z.literal("dog"), tricks: z.array(z.string()) });
const node = z.object({ value: z.string(), children: z.lazy(() => z.array(node)) });
const schemas = {
  user,
  optional: z.object({ a: z.string().optional(), b: z.number().nullable(), c: z.boolean().nullish(), d: z.string().default("x") }),
  described: z.object({ city: z.string().describe("A city"), unit: z.enum(["C", "F"]).describe("Unit") }),
  strict: z.object({ a: z.string() }).strict(),
  passthrough: z.object({ a: z.string() }).passthrough(),
  catchall: z.object({ a: z.string() }).catchall(z.string()),
  numbers: z.object({ i: z.number().int(), r: z.number().min(0).max(1), g: z.number().gt(0).lt(10), m: z.number().multipleOf(5) }),
  texts: z.object({ s: z.string().min(1).max(5), re: z.string().regex(/^[a-z]+\d*$/), a: z.string().startsWith("ab"), e: z.string().endsWith("yz"), i: z.string().includes("-") }),
  formats: z.object({ mail: z.string().email(), url: z.string().url(), id: z.string().uuid(), at: z.string().datetime(), day: z.string().date(), clock: z.string().time() }),
  formats2: z.object({ cuid: z.string().cuid(), ulid: z.string().ulid(), nano: z.string().nanoid(), b64: z.string().base64(), span: z.string().duration(), emoji: z.string().emoji() }),
  addresses: four ? z.object({ v4: z.ipv4(), v6: z.ipv6(), range: z.cidrv4() }) : z.object({ ip: z.string().ip(), v4: z.string().ip({ version: "v4" }) }),
  arrays: z.object({ a: z.array(user).min(1).max(3), b: z.array(z.number()).length(2), c: z.array(z.string()).nonempty() }),
  tuples: z.object({ pair: z.tuple([z.string(), z.number()]), rest: z.tuple([z.string()]).rest(z.number()) }),
  records: z.object({ any: z.record(z.string(), z.number()), keyed: z.record(z.string().regex(/^[a-z]+$/), z.boolean()), byEnum: z.record(z.enum(["x", "y"]), z.string()) }),
  unions: z.object({ u: z.union([z.string(), z.number(), user]), lit: z.union([z.literal("a"), z.literal(1), z.literal(true)]) }),
  discriminated: z.object({ pet: z.discriminatedUnion("kind", [cat, dog]) }),
  intersection: z.intersection(z.object({ a: z.string() }), z.object({ b: z.number() })),
  recursive: node,
  reused: z.object({ home: user, work: user, all: z.array(user) }),
  enums: z.object({ native: z.nativeEnum({ Up: "up", Down: "down" }), numeric: z.nativeEnum({ A: 1, B: 2 }), none: z.null() }),
  anything: z.object({ any: z.any(), unknown: z.unknown(), list: z.array(z.any()) }),
  refined: z.object({ even: z.number().refine((n) => n % 2 === 0), s: z.string().transform((s) => s.length).pipe(z.number()) }),
  partial: user.partial(),
  extended: user.extend({ mail: z.string().email() }).omit({ age: true }),
  branded: z.object({ id: z.string().brand("Id"), big: four ? z.int() : z.number().int().safe(), ro: z.array(z.string()).readonly() }),
  caught: z.object({ a: z.string().catch("x"), b: z.number().finite() }),
  entities: z.object({ entities: z.array(z.object({ type: z.enum(["person", "place"]), text: z.string(), score: z.number().min(0).max(1) })) }),
  array: z.array(user),
};
if (!four) schemas.set = z.object({ tags: z.set(z.string()), map: z.map(z.string(), z.number()), when: z.date(), big: z.bigint() });
const made = Object.entries(schemas).map(([name, s]) => [name, four ? z.toJSONSchema(s, { io: "input" }) : zodToJsonSchema(s)]);
if (four) made.push(["draft7", z.toJSONSchema(schemas.reused, { target: "draft-7", reused: "ref" })], ["output", z.toJSONSchema(schemas.optional)]);
else made.push(["openai", zodToJsonSchema(schemas.reused, { name: "Reused", target: "openAi" })], ["named", zodToJsonSchema(node, "Node")]);
const by = four ? version("zod") : `${version("zod-to-json-schema")} from ${version("zod")}'s zod/v3`;
console.log(JSON.stringify({ made: by, schemas: Object.fromEntries(made) }, null, 1));
