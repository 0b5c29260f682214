"""Three things that people ask of an assistant, made by rules: data out of messages, SQL of questions, sums in steps.

For a base that knows English, as those of `tasks.py` are for the embedded one: `smollm2.py` trains on them.
"""

import json
import random

from tucka_runtime.trainer.experiments.tasks import Record, Task

FIRST = "Maria Omar Lena Pavel Aisha Tom Ingrid Diego Yuki Sofia Noah Priya Karl Zoe Ivan Amara".split()
LAST = "Lopez Haddad Fischer Novak Khan Baker Dahl Romero Tanaka Rossi Cohen Patel Weber Moreau Petrov Okafor".split()
CITIES = "Lyon Oslo Porto Graz Delft Turin Bergen Malmo Ghent Split Cork Basel Gdansk Leeds Seville Tartu".split()
COLOURS = "red blue green black white yellow grey brown".split()
ITEMS = (
    "lamp chair desk cabinet mirror carpet kettle clock basket blanket pillow vase cushion stool bucket ladder".split()
)
SERVICES = ["dentist", "haircut", "eye test", "car service", "piano lesson", "tax advice", "massage", "house viewing"]
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday".split()
SHOPS = "Nordmarkt Brava Hills Piccolo Orbit Kestrel Lumen Tessera".split()
GOODS = "pens apples stamps tickets candles notebooks bulbs mugs bricks tulips".split()


def _name(rng: random.Random) -> str:
    return f"{rng.choice(FIRST)} {rng.choice(LAST)}"


# extract: a message becomes an object that a program can read.


def _order(rng: random.Random) -> Record:
    who, city, count = _name(rng), rng.choice(CITIES), rng.randint(2, 40)
    item = f"{rng.choice(COLOURS)} {rng.choice(ITEMS)}"
    text = rng.choice([
        f"Hi, this is {who}. Please send {count} {item}s to our shop in {city}.",
        f"We need {count} {item}s in {city} as soon as you can. Regards, {who}",
        f"Good morning! Could you ship {count} {item}s to {city}? Thanks, {who}",
    ])  # fmt: skip
    answer = {"customer": who, "item": item, "quantity": count, "city": city}
    return f"Write this order as JSON with customer, item, quantity, city.\n\n{text}", json.dumps(answer), "order"


def _appointment(rng: random.Random) -> Record:
    who, day = _name(rng), rng.choice(DAYS)
    service = rng.choice(SERVICES)
    hour, minute = rng.randint(8, 17), rng.choice(["00", "15", "30", "45"])
    text = rng.choice([
        f"My name is {who} and I would like a {service} on {day} at {hour}:{minute}.",
        f"Can I come for a {service} at {hour}:{minute} on {day}? {who}",
        f"{day}, {hour}:{minute}, {service}, for {who} please.",
    ])  # fmt: skip
    answer = {"name": who, "service": service, "day": day, "time": f"{hour:02d}:{minute}"}
    return f"Write this booking as JSON with name, service, day, time.\n\n{text}", json.dumps(answer), "appointment"


def _expense(rng: random.Random) -> Record:
    who, shop, city = _name(rng), rng.choice(SHOPS), rng.choice(CITIES)
    euros, cents = rng.randint(2, 300), rng.randint(0, 99)
    text = rng.choice([
        f"{who} paid {euros},{cents:02d} euros at {shop} in {city}.",
        f"Receipt from {shop}, {city}: EUR {euros}.{cents:02d}, claimed by {who}",
        f"I spent {euros}.{cents:02d} EUR at {shop} ({city}). {who}",
    ])  # fmt: skip
    answer = {"employee": who, "shop": shop, "city": city, "cents": 100 * euros + cents}
    return f"Write this expense as JSON with employee, shop, city, cents.\n\n{text}", json.dumps(answer), "expense"


# sql: a question about small tables becomes a query. By a table's name: its text columns with values, its numbers.

_TABLES = {
    "orders": ({"city": CITIES, "item": ITEMS}, ("quantity", "price")),
    "employees": ({"name": FIRST, "city": CITIES}, ("age", "salary")),
    "products": ({"name": ITEMS, "colour": COLOURS}, ("price", "stock")),
    "trips": ({"driver": FIRST, "destination": CITIES}, ("distance", "cost")),
    "rooms": ({"hotel": SHOPS, "city": CITIES}, ("beds", "price")),
}
_COMPARE = {"more than": ">", "less than": "<", "at least": ">="}
_AGGREGATE = {"average": "AVG", "highest": "MAX", "lowest": "MIN", "total": "SUM"}


def _schema(table: str) -> str:
    texts, numbers = _TABLES[table]
    return f"{table}(id, {', '.join([*texts, *numbers])})"


def _asked(table: str, question: str, query: str, task: str) -> Record:
    return f"Table: {_schema(table)}\nWrite SQL: {question}", f"{query};", task


def _filtered(rng: random.Random) -> Record:
    table = rng.choice(list(_TABLES))
    texts, numbers = _TABLES[table]
    shown, column = rng.sample(list(texts), 2)
    number, how, limit = rng.choice(numbers), rng.choice(list(_COMPARE)), rng.randint(2, 900)
    value = rng.choice(texts[column])
    question = f"the {shown} of {table} with {column} {value} and {how} {limit} {number}"
    query = f"SELECT {shown} FROM {table} WHERE {column} = '{value}' AND {number} {_COMPARE[how]} {limit}"
    return _asked(table, question, query, "filter")


def _counted(rng: random.Random) -> Record:
    table = rng.choice(list(_TABLES))
    texts, _ = _TABLES[table]
    column = rng.choice(list(texts))
    one, other = rng.sample(texts[column], 2)
    question = f"how many {table} have {column} {one} or {other}?"
    return _asked(
        table, question, f"SELECT COUNT(*) FROM {table} WHERE {column} IN ('{one}', '{other}')", "count"
    )  # fmt: skip


def _grouped(rng: random.Random) -> Record:
    table = rng.choice(list(_TABLES))
    texts, numbers = _TABLES[table]
    column, number, how = rng.choice(list(texts)), rng.choice(numbers), rng.choice(list(_AGGREGATE))
    least = rng.randint(2, 900)
    question = f"the {how} {number} of {table} for each {column}, where it is over {least}"
    made = f"{_AGGREGATE[how]}({number})"
    query = f"SELECT {column}, {made} FROM {table} GROUP BY {column} HAVING {made} > {least}"
    return _asked(table, question, query, "group")


def _ordered(rng: random.Random) -> Record:
    table = rng.choice(list(_TABLES))
    texts, numbers = _TABLES[table]
    column, number, first = rng.choice(list(texts)), rng.choice(numbers), rng.randint(2, 60)
    most = rng.random() < 0.5
    question = f"the {column} of the {first} {table} with the {'highest' if most else 'lowest'} {number}"
    order = f"ORDER BY {number} {'DESC' if most else 'ASC'} LIMIT {first}"
    return _asked(table, question, f"SELECT {column} FROM {table} {order}", "top")


# steps: a word problem, answered by its sums, one a line.


def _change(rng: random.Random) -> Record:
    who, goods, count, price = rng.choice(FIRST), rng.choice(GOODS), rng.randint(2, 12), rng.randint(2, 9)
    cost = count * price
    note = rng.choice([n for n in (20, 50, 100, 200) if n > cost])
    text = f"{who} buys {count} {goods} at {price} euros each and pays with {note} euros. How much is the change?"
    return text, f"{count} * {price} = {cost}\n{note} - {cost} = {note - cost}\nAnswer: {note - cost}", "change"


def _total(rng: random.Random) -> Record:
    who, (one, two) = rng.choice(FIRST), rng.sample(GOODS, 2)
    a, b, c, d = (rng.randint(2, 9) for _ in range(4))
    text = f"{who} buys {a} {one} at {b} euros each and {c} {two} at {d} euros each. What is the sum?"
    x, y = a * b, c * d
    return text, f"{a} * {b} = {x}\n{c} * {d} = {y}\n{x} + {y} = {x + y}\nAnswer: {x + y}", "total"


def _share(rng: random.Random) -> Record:
    who, goods, people, each = rng.choice(FIRST), rng.choice(GOODS), rng.randint(2, 9), rng.randint(2, 12)
    kept = rng.randint(2, 15)
    all_ = people * each + kept
    text = f"{who} has {all_} {goods}, keeps {kept} and shares the rest among {people} friends. How many does each get?"
    left = all_ - kept
    return text, f"{all_} - {kept} = {left}\n{left} / {people} = {each}\nAnswer: {each}", "share"


def _travel(rng: random.Random) -> Record:
    city, other = rng.sample(CITIES, 2)
    speed, hours, more = 10 * rng.randint(3, 12), rng.randint(2, 6), rng.randint(5, 60)
    text = (
        f"A van leaves {city} at {speed} km an hour. After {hours} hours it is {more} km from {other}. How long is the "
        "way?"
    )
    way = speed * hours
    return text, f"{speed} * {hours} = {way}\n{way} + {more} = {way + more}\nAnswer: {way + more}", "travel"


TASKS = {
    task.name: task
    for task in (
        Task("extract", "orders, bookings and expenses to JSON", (_order, _appointment, _expense)),
        Task("sql", "questions about a small table to SQL", (_filtered, _counted, _grouped, _ordered)),
        Task("steps", "word problems, by their sums", (_change, _total, _share, _travel)),
    )
}
