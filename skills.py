"""What the default model is taught besides text: skills with worked steps, an encyclopaedia, and manners.

Three million active parameters cannot know all of NumPy, but they can know a small world well: sums, lists,
letters, days, clocks and units; some 200 Python functions by name; how to greet, and when to say "I do not
know". Every answer is computed, or read from a docstring at run time. Only the manners are written by hand.

Two things are held out from all training: 5 % of the items (sums, lists, ...), by the hash of an item's key,
and the last phrasing of each row in the tables below. Skills are tested on items never seen. A fact must be
seen to be known, so it is asked in a phrasing never seen; an invented name must be one never seen.

What it is not: text (corpus.py, which asks this file for everything in it), or the test (lab/evaluate.py).
Nothing to run; `python data.py` shows an example of each kind.
"""
import inspect
import itertools
import pydoc
import random
import re
from collections import namedtuple
from collections.abc import Iterator

# `key` decides what is held out; an item without one is taught in any case.
Item = namedtuple("Item", "kind key question reply")

REPEATS = 10    # of every fact and greeting in one epoch of conversations, over all trained phrasings
EACH = 1200     # conversations about each skill in one epoch; twice as many about sums and letters
SHOWN = ("sum of two", "sum of three", "comparison", "sort", "weekday", "summary of", "unknown", "manners")

# ----------------------------------------------------------------------------------------------------------
# How to ask. The last phrasing of each row is held out

PHRASINGS = {
    "sum": "What is {x}? | How much is {x}? | Calculate {x}. | {x} = ? | Work out {x}.",
    "comparison": "Which is {more}, {a} or {b}? | Which number is {more}, {a} or {b}? | "
                  "Is {a} or {b} {more}? | Tell me which is {more}, {a} or {b}.",
    "sequence": "What comes next, {x}? | What is the next number after {x}? | Continue {x}. | "
                "Which number follows {x}?",
    "sort": "Sort {x}. | Sort the numbers {x}. | Put {x} in order. | Order {x} from small to large. | "
            "Arrange the numbers {x}.",
    "reverse": "Reverse {x}. | Reverse the list {x}. | Say {x} backwards. | Turn around the list {x}.",
    "letters": "How many {a} are in {x}? | How many letters {a} are in {x}? | Count the {a} in {x}. | "
               "How often is {a} in {x}? | How many times is {a} in {x}?",
    "spelling": "Spell {x}. | How do you spell {x}? | Spell the word {x}. | How is {x} spelled?",
    "weekday": "What day is {n} days {way} {x}? | Which day is {n} days {way} {x}? | "
               "Which day comes {n} days {way} {x}?",
    "clock": "What time is it {n} minutes after {x}? | It is {x}, what time is it in {n} minutes? | "
             "Add {n} minutes to {x}. | What time is {x} plus {n} minutes?",
    "units": "How many {small} are {n} {large}? | How many {small} are in {n} {large}? | "
             "Convert {n} {large} to {small}. | What is {n} {large} in {small}?",
    "summary of": "What does {x} do? | What is {x}? | What is `{x}` for? | Explain {x}. | "
                  "Tell me about {x}. | What does `{x}` do? | Explain what {x} does.",
    "signature of": "What is the signature of {x}? | Which arguments does {x} take? | "
                    "How do I call `{x}`? | What are the parameters of {x}? | Show the arguments of {x}. | "
                    "Show the signature of {x}.",
    "module of": "Which module holds {x}? | Where is {x} defined? | Which module is `{x}` in? | "
                 "From which module is {x}? | What module has {x}? | In which module is {x}?",
}
STORIES = ("{name} has {a} {things}, then {moves}. How many {things} does {name} have now? | "
           "{name} had {a} {things} and {moves}. How many {things} are left? | "
           "There were {a} {things}. {name} {moves}. How many {things} are there?")
MOVES = {"+": ("gets {} more", "finds {}", "buys {}"), "-": ("gives away {}", "loses {}", "sells {}")}
NAMES = "Ada Ben Chen Dina Emil Fatima Grace Hugo Ines Jun".split()
THINGS = "apples books coins stamps pencils marbles cards shells tickets buttons".split()
WORDS = """apple banana cherry orange lemon melon strawberry tomato potato carrot onion bread butter
    cheese coffee water sugar pepper garden flower tree forest river mountain island ocean summer winter
    morning evening window kitchen table chair bottle pencil paper letter number planet rocket yellow
    purple silver mother father sister brother teacher doctor friend rabbit monkey elephant tiger zebra
    parrot mississippi committee balloon address success bookkeeper parallel programming computer python
    model expert router""".split()
LARGER = {"larger": max, "bigger": max, "greater": max, "smaller": min, "less": min}
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
UNITS = (("hours", "minutes", 60), ("minutes", "seconds", 60), ("metres", "centimetres", 100),
         ("kilometres", "metres", 1000), ("kilograms", "grams", 1000), ("centimetres", "millimetres", 10),
         ("euros", "cents", 100), ("litres", "millilitres", 1000))

# What a person may ask about by name. C functions among them have docstrings that no source file shows.
ENCYCLOPAEDIA = """abs all any bin bool bytes callable chr dict divmod enumerate eval filter float format
    frozenset getattr hasattr hash hex id input int isinstance issubclass iter len list map max min next
    object oct open ord pow print range repr reversed round set slice sorted str sum tuple type vars zip
    str.capitalize str.count str.endswith str.find str.isdigit str.join str.lower str.lstrip str.partition
    str.replace str.rstrip str.split str.splitlines str.startswith str.strip str.swapcase str.title str.upper
    str.zfill list.append list.clear list.copy list.extend list.index list.insert list.pop list.remove
    list.reverse list.sort dict.get dict.items dict.keys dict.pop dict.setdefault dict.update dict.values
    set.add set.discard set.union bytes.decode bytes.hex json.dump json.dumps json.load json.loads
    textwrap.dedent textwrap.fill textwrap.indent textwrap.shorten textwrap.wrap pathlib.Path.exists
    pathlib.Path.glob pathlib.Path.is_dir pathlib.Path.is_file pathlib.Path.iterdir pathlib.Path.mkdir
    pathlib.Path.read_text pathlib.Path.resolve pathlib.Path.unlink pathlib.Path.write_text os.getcwd
    os.listdir os.makedirs os.remove os.rename os.walk os.path.basename os.path.dirname os.path.exists
    os.path.getsize os.path.isabs os.path.isfile os.path.join os.path.splitext math.acos math.ceil math.comb
    math.cos math.exp math.factorial math.floor math.gcd math.hypot math.isnan math.log2 math.perm math.prod
    math.sin math.sqrt math.tan random.choice random.choices random.gauss random.randint random.random
    random.sample random.shuffle random.uniform re.compile re.escape re.findall re.finditer re.fullmatch
    re.match re.search re.sub shutil.copy shutil.copytree shutil.disk_usage shutil.move shutil.rmtree
    shutil.which time.monotonic time.sleep time.time statistics.mean statistics.median statistics.mode
    statistics.stdev statistics.variance itertools.accumulate itertools.chain itertools.combinations
    itertools.count itertools.cycle itertools.groupby itertools.permutations itertools.product
    itertools.repeat itertools.takewhile functools.cache functools.lru_cache functools.partial
    functools.reduce functools.wraps collections.Counter collections.OrderedDict collections.defaultdict
    collections.deque collections.namedtuple heapq.heapify heapq.heappop heapq.heappush heapq.nlargest
    bisect.bisect_left bisect.insort copy.copy copy.deepcopy inspect.getdoc inspect.signature subprocess.run
    tempfile.mkdtemp urllib.parse.quote urllib.parse.urlencode zlib.compress zlib.decompress""".split()
SYLLABLES = "ba do fi glo kra lum mi nar po quo ri spli tur ven wob zu".split()
MANNERS = {
    "Who are you? | What are you? | What is your name? | Are you a robot? | Who made you? | "
    "Tell me about yourself. | Tell me your name. | Tell me who you are.":
        "I am MobileMoE, a small mixture of experts that was trained in minutes, to show how it is done.",
    "Hello! | Hi! | Hey! | Good morning! | Good evening! | Hi there! | Hey there! | Hello there!":
        "Hello! Ask me for a sum, a word, a day or a Python function.",
    "Thank you. | Thanks! | Thank you very much. | Great, thanks. | Thank you a lot. | Thanks a lot!":
        "You are welcome.",
    "Goodbye. | Bye! | See you later. | Good night. | Bye, see you!": "Goodbye!",
    "What can you do? | Help! | What do you know? | What can I ask you? | Tell me what you can do.":
        "I can add and subtract, compare, sort and continue numbers, reverse lists, spell, tell days and "
        "times, convert units and say what 200 Python functions do. I have 15 million parameters and may be "
        "wrong.",
}

# ----------------------------------------------------------------------------------------------------------
# Skills. Each yields (kind, row of phrasings, what fills them in, key, the steps, the answer)


def steps_of(numbers: list[int], signs: str) -> tuple[str, list[int]]:
    """[7, 5, 3], "+-" -> ("7 + 5 = 12, 12 - 3 = 9", [12, 9])."""
    totals = numbers[:1]
    steps = []
    for sign, number in zip(signs, numbers[1:]):
        totals.append(totals[-1] + (number if sign == "+" else -number))
        steps.append(f"{totals[-2]} {sign} {number} = {totals[-1]}")
    return ", ".join(steps), totals[1:]


def sums(rng: random.Random) -> Iterator[tuple]:
    """Three numbers, up to 20, or two, up to 30, of which a large second is taken in steps: tens, then ones.

    There are few enough such steps to know them by heart. So new sums show whether a model can chain them.
    Sums of two with one step are themselves a step, and always taught.
    """
    cases = [("sum of two", [a, b], [a, b], sign, 30)
             for sign, a, b in itertools.product("+-", range(1, 31), range(1, 11))]
    cases += [("sum of two", [a, b], [a, b // 10 * 10, b % 10], 2 * sign, 30)
              for sign, a, b in itertools.product("+-", range(1, 31), range(11, 30)) if b % 10]
    cases = 2 * cases               # (with other stories the second time)
    cases += [("sum of three", [a, b, c], [a, b, c], first + second, 20) for first, second, a, b, c in
              itertools.product("+-", "+-", range(2, 21), range(2, 10), range(2, 10))]
    for kind, numbers, parts, signs, limit in cases:
        steps, totals = steps_of(parts, signs)
        if 1 <= min(totals) and max(totals) <= limit:
            first, *others = numbers
            moves = list(zip(signs, others))
            bare = f"{first}" + "".join(f" {sign} {number}" for sign, number in moves)
            key = bare if len(parts) == 3 else ""
            yield kind, PHRASINGS["sum"], {"x": bare}, key, steps, totals[-1]
            told = " and ".join(rng.choice(MOVES[sign]).format(number) for sign, number in moves)
            names = {"name": rng.choice(NAMES), "things": rng.choice(THINGS)}
            yield kind, STORIES, {"a": first, "moves": told, **names}, key, steps, totals[-1]


def comparisons(rng: random.Random) -> Iterator[tuple]:
    for a, b in itertools.permutations(range(1, 61), 2):
        more = rng.choice([*LARGER])
        answer = LARGER[more](a, b)
        steps = f"{answer} is {more} than {a + b - answer}"
        yield ("comparison", PHRASINGS["comparison"], {"a": a, "b": b, "more": more},
               f"{min(a, b)} {max(a, b)}", steps, answer)


def lists(rng: random.Random) -> Iterator[tuple]:
    """Sequences to continue, numbers to sort, words to reverse. A list in another order has the same key."""
    for first, step in 8 * [*itertools.product(range(1, 21), range(1, 6))]:
        *shown, answer = range(first, first + 5 * step, step)
        yield ("sequence", PHRASINGS["sequence"], {"x": ", ".join(map(str, shown))},
               " ".join(map(str, shown)),
               f"from {shown[-2]} to {shown[-1]} are {step}, {shown[-1]} + {step} = {answer}", answer)
    for _ in range(EACH):
        numbers = rng.sample(range(1, 31), 3)
        words = rng.sample(WORDS, 3)
        yield ("sort", PHRASINGS["sort"], {"x": ", ".join(map(str, numbers))},
               " ".join(map(str, sorted(numbers))), "", ", ".join(map(str, sorted(numbers))))
        yield ("reverse", PHRASINGS["reverse"], {"x": ", ".join(words)},
               " ".join(sorted(words)), "", ", ".join(reversed(words)))


def letters(rng: random.Random) -> Iterator[tuple]:
    """Counting spells a word and numbers each find, as a finger would."""
    for word in 6 * WORDS:          # each time other letters, in other phrasings
        yield "spelling", PHRASINGS["spelling"], {"x": word}, "", "", ", ".join(word)
        for letter in sorted(set(word) | set(rng.sample("aeinorst", 3))):
            found = itertools.count(1)
            steps = ", ".join(f"{one} ({next(found)})" if one == letter else one for one in word)
            yield ("letters", PHRASINGS["letters"], {"a": letter, "x": word}, f"{letter} {word}", steps,
                   word.count(letter))


def times(rng: random.Random) -> Iterator[tuple]:
    """Days of the week, and the clock."""
    ways = (("after", 1), ("before", -1))
    for day, n, (way, sign) in 8 * [*itertools.product(range(7), range(1, 8), ways)]:
        walk = [f"{step} {DAYS[(day + sign * step) % 7]}" for step in range(1, n + 1)]
        yield ("weekday", PHRASINGS["weekday"], {"n": n, "way": way, "x": DAYS[day]},
               f"{n} {way} {DAYS[day]}", ", ".join(walk), walk[-1].split()[1])
    for hour, minute, n in itertools.product(range(1, 13), range(0, 60, 5), range(5, 60, 5)):
        total = minute + n
        steps = f"{minute} and {n} are {total}" + f", less 60 is {total - 60}" * (total >= 60)
        yield ("clock", PHRASINGS["clock"], {"n": n, "x": f"{hour}:{minute:02d}"}, f"{hour}:{minute:02d} {n}",
               steps, f"{hour % 12 + 1 if total >= 60 else hour}:{total % 60:02d}")


def units(rng: random.Random) -> Iterator[tuple]:
    for (large, small, factor), n in 6 * [*itertools.product(UNITS, range(2, 21))]:
        yield ("units", PHRASINGS["units"], {"n": n, "large": large, "small": small}, f"{n} {large}",
               f"1 {large[:-1]} is {factor} {small}, {n} x {factor} = {n * factor}", n * factor)

# ----------------------------------------------------------------------------------------------------------
# The encyclopaedia, invented names, manners


def module_of(name: str) -> str:
    """The longest part of a name that is a module: "os.path" of "os.path.join", "builtins" of "len"."""
    parts = name.split(".")
    paths = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
    return next((path for path in paths if inspect.ismodule(pydoc.locate(path))), "builtins")


def facts(held_out) -> Iterator[tuple[str, str, str]]:
    """(kind, what is asked about, reply): what each name does, how to call it, which module holds it.

    A docstring that is held out from the text is not taught here either.
    """
    shorts = [name.removeprefix(f"{module_of(name)}.") for name in ENCYCLOPAEDIA]
    for name, short in zip(ENCYCLOPAEDIA, shorts):
        text = inspect.getdoc(pydoc.locate(name))
        if held_out(text):
            continue
        # The docstring of a C function may begin with its signature: "max(iterable, *[, default=obj, ...".
        text = re.sub(rf"^{short}\(.*?(\n\n|\Z)", "", text, flags=re.S)
        sentence = re.match(r".*?\.(?= [A-Z]|$)", " ".join(text.split("\n\n")[0].split()))
        if sentence and len(sentence[0]) <= 120:
            yield "summary of", name, sentence[0]
        try:
            signature = re.sub(r"^\(self(, /)?(, )?", "(", str(inspect.signature(pydoc.locate(name))))
        except ValueError:              # some C functions have none
            signature = ""
        if 2 < len(signature) <= 60 and " at 0x" not in signature:
            yield "signature of", name, f"`{name}{signature}`"
        if shorts.count(short) == 1:    # else the question has two answers
            yield "module of", short, f"`{short}` is in the module `{module_of(name)}`."


def unknown(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Invented names, in real modules and in invented ones -> (name, reply)."""
    modules = sorted({module_of(name) for name in ENCYCLOPAEDIA})
    for _ in range(EACH):
        stem, other = ("".join(rng.choices(SYLLABLES, k=2)) for _ in range(2))
        name = rng.choice((stem, f"{other}.{stem}", f"{rng.choice(modules)}.{stem}"))
        yield name, f"I do not know `{name}`."

# ----------------------------------------------------------------------------------------------------------
# All of it


def phrased(row: str, fields: dict, unseen: bool, rng: random.Random) -> str:
    """A question in one of the row's phrasings: one that is trained on, or the one that never is."""
    *seen, last = row.split(" | ")
    question = (last if unseen else rng.choice(seen)).format(**fields)
    # People do not always type capitals and full stops.
    return question if unseen or rng.random() < 0.7 else question[0].lower() + question[1:].rstrip("?.!")


def skill_items(rng: random.Random, held_out) -> tuple[list[Item], list[Item]]:
    """(taught, held out): held_out(key) decides which of the two an item is."""
    taught, unseen = [], []
    for make in (sums, comparisons, lists, letters, times, units):
        for kind, row, fields, key, steps, answer in make(rng):
            kept = bool(key) and held_out(key)
            asked_anew = kept and rng.random() < 0.5        # a held-out item, in a phrasing of either sort
            reply = f"{steps}. The answer is {answer}." if steps else f"The answer is {answer}."
            (unseen if kept else taught).append(Item(kind, key, phrased(row, fields, asked_anew, rng), reply))
    return taught, unseen


def known_items(rng: random.Random, held_out) -> tuple[list[Item], list[Item]]:
    """Facts, "I do not know" and manners, likewise."""
    taught, unseen = [], []
    rows = [(kind, PHRASINGS[kind], {"x": about}, reply) for kind, about, reply in facts(held_out)]
    rows += [("manners", row, {}, reply) for row, reply in MANNERS.items()]
    for kind, row, fields, reply in rows:
        times = REPEATS if fields else 12 * REPEATS
        taught += [Item(kind, "", phrased(row, fields, False, rng), reply) for _ in range(times)]
        unseen.append(Item(kind, "", phrased(row, fields, True, rng), reply))
    for name, reply in unknown(rng):
        row = PHRASINGS[rng.choice(("summary of", "signature of", "module of"))]
        kept = held_out(name)
        item = Item("unknown", name, phrased(row, {"x": name}, kept, rng), reply)
        (unseen if kept else taught).append(item)
    return taught, unseen


def is_right(reply: str, said: str) -> bool:
    """Are the first six words of what was said those of the reply? Of worked steps only the answer counts."""
    expected, found = (text.split("The answer is ")[-1].strip(" .\n").split()[:6] for text in (reply, said))
    return expected == found
