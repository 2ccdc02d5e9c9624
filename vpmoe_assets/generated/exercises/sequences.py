"""Problems about whole numbers: an iterated rule, prime factors, number bases, linear equations."""
# ruff: noqa: E501 -- a sentence stays on one line, so that the languages can be compared

import random
from collections.abc import Iterator

from vpmoe_assets.generated.exercises.draft import BRIEF, Draft, Step, answer, reasoning, take

_RULE = {
    "en": (
        (
            "Take the number {n}. If it is even, halve it; if it is odd, multiply it by 3 and add 1. Do this {k} times. Where do you end up?",
            "hey, can you run the 'half or 3n+1' rule starting at {n} for {k} steps and tell me the number I get? show the steps pls",
            "Starting from {n}, apply the Collatz rule (even: divide by 2, odd: times 3 plus 1) {k} times and list every value.",
        ),
        "Each value follows from the one before: an even number is halved, an odd number is multiplied by 3 and 1 is added.",
        "After {k} steps you reach **{last}**. The largest value in the list is {peak}.",
    ),
    "it": (
        (
            "Parti dal numero {n}. Se è pari, dividilo per 2; se è dispari, moltiplicalo per 3 e aggiungi 1. Ripeti {k} volte: a quale numero arrivi?",
        ),
        "Ogni valore si ottiene dal precedente: un numero pari si divide per 2, un numero dispari si moltiplica per 3 e si aggiunge 1.",
        "Dopo {k} passi si arriva a **{last}**. Il valore più grande dell'elenco è {peak}.",
    ),
    "pl": (
        (
            "Zacznij od liczby {n}. Liczbę parzystą podziel przez 2, a nieparzystą pomnóż przez 3 i dodaj 1. Liczba kroków: {k}. Jaki jest wynik?",
        ),
        "Każda wartość wynika z poprzedniej: liczbę parzystą dzielimy przez 2, a nieparzystą mnożymy przez 3 i dodajemy 1.",
        "Po wykonaniu wszystkich kroków (jest ich {k}) otrzymujemy **{last}**. Największa wartość na liście to {peak}.",
    ),
    "fr": (
        (
            "Pars du nombre {n}. S'il est pair, divise-le par 2 ; s'il est impair, multiplie-le par 3 et ajoute 1. Recommence {k} fois : quel nombre obtient-on ?",
        ),
        "Chaque valeur se déduit de la précédente : un nombre pair est divisé par 2, un nombre impair est multiplié par 3 puis augmenté de 1.",
        "Après {k} étapes, on obtient **{last}**. La plus grande valeur de la liste est {peak}.",
    ),
    "es": (
        (
            "Empieza con el número {n}. Si es par, divídelo entre 2; si es impar, multiplícalo por 3 y suma 1. Repite {k} veces. ¿A qué número llegas?",
        ),
        "Cada valor se obtiene del anterior: un número par se divide entre 2 y un número impar se multiplica por 3 y se le suma 1.",
        "Después de {k} pasos se llega a **{last}**. El valor más grande de la lista es {peak}.",
    ),
    "de": (
        (
            "Beginne mit der Zahl {n}. Ist sie gerade, halbiere sie; ist sie ungerade, multipliziere sie mit 3 und addiere 1. Wiederhole das {k}-mal. Welche Zahl erhältst du?",
        ),
        "Jeder Wert folgt aus dem vorigen: Eine gerade Zahl wird halbiert, eine ungerade mit 3 multipliziert und um 1 erhöht.",
        "Nach {k} Schritten erhält man **{last}**. Der größte Wert der Liste ist {peak}.",
    ),
    "nl": (
        (
            "Begin met het getal {n}. Is het even, deel het dan door 2; is het oneven, vermenigvuldig het met 3 en tel er 1 bij op. Doe dit {k} keer. Op welk getal kom je uit?",
        ),
        "Elke waarde volgt uit de vorige: een even getal wordt door 2 gedeeld, een oneven getal wordt met 3 vermenigvuldigd en met 1 verhoogd.",
        "Na {k} stappen kom je uit op **{last}**. De grootste waarde in de lijst is {peak}.",
    ),
}


def iterated_rule(rng: random.Random, language: str, budget: int) -> Draft:
    """Halve even numbers, send odd ones to 3n + 1."""
    start = rng.randrange(1_001, 99_999)
    values = [start]

    def steps() -> Iterator[Step]:
        while True:
            value = values[-1]
            if value % 2:
                line, after, kind = f"{value} × 3 + 1 = {value * 3 + 1}", value * 3 + 1, "odd"
            else:
                line, after, kind = f"{value} ÷ 2 = {value // 2}", value // 2, "even"
            values.append(after)
            yield Step(f"Step {len(values) - 1}: {value} is {kind}, {line}", line)

    taken = take(steps(), int(0.93 * budget) - 280)
    del values[len(taken) + 1 :]
    odd = sum(value % 2 for value in values[:-1])
    queries, opening, closing = _RULE[language]
    last, count, peak = values[-1], len(taken), max(values[1:])
    return Draft(
        rng.choice(queries).format(n=start, k=count),
        reasoning(
            f"Apply a parity rule {count} times, starting from {start}, and report the value reached.",
            "Look at the last digit to decide between the two branches, compute one value per step, and number the "
            "steps so that none is lost. The order matters, so nothing can be skipped or done in parallel.",
            [step.working for step in taken],
            f"Odd branches taken: {odd}; even branches taken: {count - odd}. Together {odd} + {count - odd} = {count}, "
            f"which is the number of steps asked for. No odd step is followed by another odd step, because 3n + 1 is even "
            "for odd n: the list agrees.",
            language,
            f"The value after step {count} is {last}. The largest value met after the start is {peak}.",
            brief=budget < BRIEF,
        ),
        answer(
            opening,
            [step.result for step in taken],
            closing.format(k=count, last=last, peak=peak),
            numbered=True,
        ),
    )


_FACTORS = {
    "en": (
        (
            "Write every whole number from {a} to {b} as a product of primes.",
            "I'm checking homework: what are the prime factorisations of all integers from {a} up to and including {b}?",
            "prime factors for each number {a} to {b}, and which of them are prime?",
        ),
        "prime",
        "Here is the prime factorisation of each number from {a} to {b}. A number with no smaller factor is marked as prime.",
        "Primes in this range: {count}{which}.",
    ),
    "it": (
        ("Scrivi ogni numero intero da {a} a {b} come prodotto di numeri primi.",),
        "numero primo",
        "Ecco la scomposizione in fattori primi di ogni numero da {a} a {b}. I numeri senza divisori minori sono indicati come primi.",
        "Numeri primi in questo intervallo: {count}{which}.",
    ),
    "pl": (
        ("Rozłóż na czynniki pierwsze każdą liczbę całkowitą od {a} do {b}.",),
        "liczba pierwsza",
        "Oto rozkład na czynniki pierwsze każdej liczby od {a} do {b}. Liczby bez mniejszych dzielników są oznaczone jako pierwsze.",
        "Liczby pierwsze w tym przedziale: {count}{which}.",
    ),
    "fr": (
        ("Décompose en facteurs premiers chaque nombre entier de {a} à {b}.",),
        "nombre premier",
        "Voici la décomposition en facteurs premiers de chaque nombre de {a} à {b}. Les nombres sans diviseur plus petit sont signalés comme premiers.",
        "Nombres premiers dans cet intervalle : {count}{which}.",
    ),
    "es": (
        ("Descompón en factores primos cada número entero desde {a} hasta {b}.",),
        "número primo",
        "Esta es la descomposición en factores primos de cada número desde {a} hasta {b}. Los números sin divisores menores se marcan como primos.",
        "Números primos en este intervalo: {count}{which}.",
    ),
    "de": (
        ("Zerlege jede ganze Zahl von {a} bis {b} in Primfaktoren.",),
        "Primzahl",
        "Hier ist die Primfaktorzerlegung jeder Zahl von {a} bis {b}. Zahlen ohne kleineren Teiler sind als Primzahl gekennzeichnet.",
        "Primzahlen in diesem Bereich: {count}{which}.",
    ),
    "nl": (
        ("Ontbind elk geheel getal van {a} tot en met {b} in priemfactoren.",),
        "priemgetal",
        "Hier is de ontbinding in priemfactoren van elk getal van {a} tot en met {b}. Getallen zonder kleinere deler zijn als priemgetal aangegeven.",
        "Priemgetallen in dit bereik: {count}{which}.",
    ),
}
_POWERS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_INDICES = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def prime_factors(rng: random.Random, language: str, budget: int) -> Draft:
    """Factorise consecutive integers by trial division."""
    first = rng.randrange(100, 4_000)
    queries, prime_word, opening, closing = _FACTORS[language]
    primes: list[int] = []

    def steps() -> Iterator[Step]:
        value = first
        while True:
            factors = _trial_division(value)
            if len(factors) == 1:
                primes.append(value)
                yield Step(_why_prime(value), f"{value}: {prime_word}")
            else:
                rest, divisions = value, []
                for factor in factors[:-1]:
                    divisions.append(f"{rest} ÷ {factor} = {rest // factor}")
                    rest //= factor
                product = " × ".join(map(str, factors))
                yield Step(
                    f"{value}: {', '.join(divisions)}; {rest} is prime; {product} = {value}",
                    f"{value} = {product} = {_powers(factors)}"
                    if len(set(factors)) < len(factors)
                    else f"{value} = {product}",
                )
            value += 1

    taken = take(steps(), budget - 310)
    last = first + len(taken) - 1
    primes = [prime for prime in primes if prime <= last]
    which = f" ({', '.join(map(str, primes))})" if primes else ""
    return Draft(
        rng.choice(queries).format(a=first, b=last),
        reasoning(
            f"Factorise all integers from {first} to {last}: {last} − {first} + 1 = {len(taken)} numbers.",
            "Trial division: divide by the smallest prime that fits, continue with the quotient, and stop when the "
            "quotient is prime. A number is prime when no prime up to its square root divides it.",
            [step.working for step in taken],
            "Each product above was multiplied out again and gives the number at the start of its line. Every second "
            "number is even and every third is divisible by 3, which the list shows as well.",
            language,
            f"Primes found between {first} and {last}: {', '.join(map(str, primes)) or 'none'}.",
            brief=budget < BRIEF,
        ),
        answer(
            opening.format(a=first, b=last),
            [step.result for step in taken],
            closing.format(count=len(primes), which=which),
        ),
    )


def _trial_division(value: int) -> list[int]:
    factors, divisor = [], 2
    while divisor * divisor <= value:
        while value % divisor == 0:
            factors.append(divisor)
            value //= divisor
        divisor += 1
    return [*factors, value] if value > 1 else factors


def _why_prime(value: int) -> str:
    tried, divisor = [], 2
    while divisor * divisor <= value:
        if len(_trial_division(divisor)) == 1:
            tried.append(divisor)
        divisor += 1
    while len(_trial_division(divisor)) > 1:
        divisor += 1
    return (
        f"{value}: not divisible by {', '.join(map(str, tried))}; and "
        f"{divisor} × {divisor} = {divisor * divisor} > {value}, so {value} is prime"
    )


def _powers(factors: list[int]) -> str:
    parts = []
    for factor in dict.fromkeys(factors):
        power = factors.count(factor)
        parts.append(f"{factor}{str(power).translate(_POWERS) if power > 1 else ''}")
    return " × ".join(parts)


_BASES = {
    "en": (
        (
            "Convert these decimal numbers to base {base}: {numbers}.",
            "how do I write {numbers} in base {base}? I'd like to see the divisions",
        ),
        "To change the base, divide by {base} again and again and read the remainders from the last to the first.",
        "You can check each line by multiplying every digit by its power of {base} and adding.",
    ),
    "it": (
        ("Converti questi numeri decimali in base {base}: {numbers}.",),
        "Per cambiare base si divide più volte per {base} e si leggono i resti dall'ultimo al primo.",
        "Ogni riga si può controllare moltiplicando ciascuna cifra per la sua potenza di {base} e sommando.",
    ),
    "pl": (
        ("Zapisz te liczby dziesiętne w systemie o podstawie {base}: {numbers}.",),
        "Aby zmienić podstawę, dzielimy wielokrotnie przez {base} i odczytujemy reszty od ostatniej do pierwszej.",
        "Każdy wiersz można sprawdzić, mnożąc cyfry przez odpowiednie potęgi liczby {base} i dodając wyniki.",
    ),
    "fr": (
        ("Convertis ces nombres décimaux en base {base} : {numbers}.",),
        "Pour changer de base, on divise plusieurs fois par {base} et on lit les restes du dernier au premier.",
        "Chaque ligne se vérifie en multipliant chaque chiffre par sa puissance de {base}, puis en additionnant.",
    ),
    "es": (
        ("Convierte estos números decimales a base {base}: {numbers}.",),
        "Para cambiar de base se divide varias veces entre {base} y se leen los restos del último al primero.",
        "Cada línea se puede comprobar multiplicando cada cifra por su potencia de {base} y sumando.",
    ),
    "de": (
        ("Wandle diese Dezimalzahlen in das Zahlensystem zur Basis {base} um: {numbers}.",),
        "Zum Wechsel der Basis teilt man immer wieder durch {base} und liest die Reste vom letzten zum ersten.",
        "Jede Zeile lässt sich prüfen, indem man jede Ziffer mit ihrer Potenz von {base} multipliziert und addiert.",
    ),
    "nl": (
        ("Zet deze decimale getallen om naar grondtal {base}: {numbers}.",),
        "Om van grondtal te wisselen deel je steeds door {base} en lees je de resten van de laatste naar de eerste.",
        "Elke regel is te controleren door elk cijfer met zijn macht van {base} te vermenigvuldigen en op te tellen.",
    ),
}


def number_bases(rng: random.Random, language: str, budget: int) -> Draft:
    """Repeated division by the base."""
    base = rng.choice((3, 4, 5, 6, 7, 8, 9))
    values: list[int] = []

    def steps() -> Iterator[Step]:
        while len(values) < 16:
            value = rng.randrange(100, 30_000)
            values.append(value)
            rest, digits, lines = value, "", []
            while rest:
                lines.append(f"{rest} = {base} × {rest // base} + {rest % base}")
                digits = f"{rest % base}{digits}"
                rest //= base
            terms = " + ".join(
                f"{digit} × {base**power}"
                for power, digit in zip(range(len(digits) - 1, -1, -1), digits, strict=True)
            )
            result = f"{value}₁₀ = {digits}{str(base).translate(_INDICES)}"
            yield Step(
                f"{value}: {'; '.join(lines)}. Digits from the last remainder: {digits}",
                f"{result}: {terms} = {value}",
            )

    taken = take(steps(), int(0.95 * budget) - 260, least=1)
    del values[len(taken) :]
    queries, opening, closing = _BASES[language]
    listed = ", ".join(map(str, values))
    return Draft(
        rng.choice(queries).format(base=base, numbers=listed),
        reasoning(
            f"Numbers to convert to base {base}: {listed}.",
            f"Divide by {base}, keep the remainder, go on with the quotient until it is 0. The remainders in reverse "
            f"order are the digits, each of them below {base}.",
            [step.working for step in taken],
            f"Every digit is below {base}, and expanding the digits with the powers of {base} gives each number back; the "
            "expansions belong in the answer, where the reader can follow them.",
            language,
            f"{len(taken)} conversions to base {base} to report.",
            brief=budget < BRIEF,
        ),
        answer(opening.format(base=base), [step.result for step in taken], closing.format(base=base)),
    )


_EQUATIONS = {
    "en": (
        (
            "Solve for x: {equations}",
            "Can you solve these equations and show the check? {equations}",
            "i need x for each of these: {equations}",
        ),
        "To isolate x, first move the constant to the right-hand side, then divide by the coefficient of x.",
        "Putting each value back into its equation gives a true statement, so these are the solutions.",
    ),
    "it": (
        ("Risolvi rispetto a x: {equations}",),
        "Per isolare x si porta prima la costante a destra e poi si divide per il coefficiente di x.",
        "Sostituendo ogni valore nella sua equazione si ottiene un'uguaglianza vera: queste sono le soluzioni.",
    ),
    "pl": (
        ("Rozwiąż równania: {equations}",),
        "Aby wyznaczyć x, najpierw przenosimy stałą na prawą stronę, a potem dzielimy przez współczynnik przy x.",
        "Po podstawieniu każda wartość spełnia swoje równanie, więc to są rozwiązania.",
    ),
    "fr": (
        ("Résous ces équations d'inconnue x : {equations}",),
        "Pour isoler x, on fait d'abord passer la constante à droite, puis on divise par le coefficient de x.",
        "En remplaçant x par chaque valeur, on obtient une égalité vraie : ce sont bien les solutions.",
    ),
    "es": (
        ("Resuelve estas ecuaciones con incógnita x: {equations}",),
        "Para despejar x, primero se pasa la constante al lado derecho y después se divide entre el coeficiente de x.",
        "Al sustituir cada valor en su ecuación se obtiene una igualdad cierta, así que estas son las soluciones.",
    ),
    "de": (
        ("Löse die Gleichungen nach x auf: {equations}",),
        "Um x zu isolieren, bringt man zuerst die Konstante auf die rechte Seite und teilt dann durch den Koeffizienten von x.",
        "Setzt man die Werte in ihre Gleichungen ein, entsteht jeweils eine wahre Aussage; das sind also die Lösungen.",
    ),
    "nl": (
        ("Los deze vergelijkingen op naar x: {equations}",),
        "Om x vrij te maken breng je eerst de constante naar rechts en deel je daarna door de coëfficiënt van x.",
        "Als je elke waarde in haar vergelijking invult, klopt de gelijkheid; dit zijn dus de oplossingen.",
    ),
}


def equations(rng: random.Random, language: str, budget: int) -> Draft:
    """Linear equations with whole solutions."""
    stated: list[str] = []

    def steps() -> Iterator[Step]:
        while len(stated) < 12:
            a, x, b = rng.randrange(2, 30), rng.randrange(2, 60), rng.randrange(3, 200)
            sign, back = ("+", "−") if rng.random() < 0.5 or a * x <= b else ("−", "+")
            right = a * x + b if sign == "+" else a * x - b
            stated.append(f"{a}x {sign} {b} = {right}")
            moved = f"{right} {back} {b} = {a * x}"
            yield Step(
                f"{stated[-1]}. Move the constant: {moved}. Divide by the coefficient: {a * x} ÷ {a} = {x}. "
                f"Put it back: {a} × {x} {sign} {b} = {right}, as stated, so x = {x}",
                f"{stated[-1]}: {moved}; {a * x} ÷ {a} = {x}; **x = {x}**",
            )

    taken = take(steps(), budget - 230, least=2)
    del stated[len(taken) :]
    queries, opening, closing = _EQUATIONS[language]
    return Draft(
        rng.choice(queries).format(equations="; ".join(stated)),
        reasoning(
            f"Linear equations in one unknown, {len(taken)} of them. Each has exactly one solution, because the "
            "coefficient of x is not zero.",
            "For each: undo the constant on both sides, then divide by the coefficient, then substitute the result.",
            [step.working for step in taken],
            "Every substitution above reproduces the right-hand side of its equation.",
            language,
            "All solutions are whole numbers; report them with the two operations that lead to each.",
            brief=budget < BRIEF,
        ),
        answer(opening, [step.result for step in taken], closing),
    )
