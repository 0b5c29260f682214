// Schemas as TypeBox makes them: `npm install typebox && node from_typebox.mjs > typebox.json`.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(process.cwd() + "/");
const { Type } = await import(pathToFileURL(require.resolve("typebox")));
const version = JSON.parse(readFileSync("node_modules/typebox/package.json")).version;

const User = Type.Object({ name: Type.String(), age: Type.Integer({ minimum: 0 }) });
const Cat = Type.Object({ kind: Type.Literal("cat"), lives: Type.Integer() });
const Dog = Type.Object({ kind: Type.Literal("dog"), tricks: Type.Array(Type.String()) });
const Cyclic = Type.Cyclic({ Node: Type.Object({ value: Type.String(), children: Type.Array(Type.Ref("Node")) }) }, "Node");
const schemas = {
  User,
  Optional: Type.Object({ a: Type.Optional(Type.String()), b: Type.Readonly(Type.Number()), c: Type.Optional(User) }),
  Closed: Type.Object({ a: Type.String() }, { additionalProperties: false, $id: "Closed", title: "Closed", description: "one" }),
  Numbers: Type.Object({ i: Type.Integer({ minimum: 1, maximum: 9 }), x: Type.Number({ exclusiveMinimum: 0, exclusiveMaximum: 1 }), m: Type.Number({ multipleOf: 0.25 }) }),
  Texts: Type.Object({ s: Type.String({ minLength: 2, maxLength: 4 }), p: Type.String({ pattern: "^x+$" }), e: Type.String({ format: "email" }), d: Type.String({ format: "date-time" }) }),
  Arrays: Type.Object({ a: Type.Array(Type.Number(), { minItems: 1, maxItems: 2 }), t: Type.Tuple([Type.String(), Type.Boolean()]), u: Type.Array(Type.String(), { uniqueItems: true }) }),
  Contains: Type.Array(Type.Number(), { contains: Type.Literal(1), minContains: 1, maxContains: 2 }),
  Unions: Type.Object({ u: Type.Union([Type.String(), Type.Null()]), l: Type.Union([Type.Literal("a"), Type.Literal("b")]), pet: Type.Union([Cat, Dog]) }),
  Enum: Type.Object({ e: Type.Enum(["x", "y"]) }),
  Record: Type.Object({ r: Type.Record(Type.String(), Type.Number()), k: Type.Record(Type.Integer(), Type.String()) }),
  Intersect: Type.Intersect([Type.Object({ a: Type.String() }), Type.Object({ b: Type.Number() })]),
  Evaluated: Type.Intersect([Type.Object({ a: Type.String() }), Type.Object({ b: Type.Number() })], { unevaluatedProperties: false }),
  Template: Type.Object({ t: Type.TemplateLiteral("id-${1|2}") }),
  Anything: Type.Object({ any: Type.Any(), unknown: Type.Unknown() }),
  Partial: Type.Partial(User),
  Pick: Type.Pick(User, Type.Literal("name")),
  Composite: Type.Evaluate(Type.Intersect([User, Type.Object({ mail: Type.String() })])),
  Cyclic,
};
console.log(JSON.stringify({ made: `typebox ${version}`, schemas }, null, 1));
