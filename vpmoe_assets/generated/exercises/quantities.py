"""Problems about measures, dates and money."""
# ruff: noqa: E501 -- a sentence stays on one line, so that the languages can be compared

import calendar
import datetime
import random
from collections.abc import Iterator
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal

from vpmoe_assets.generated.exercises.draft import BRIEF, Draft, Step, answer, number, reasoning, take

_UNITS = (
    ("mi", "km", "1.609344"),
    ("lb", "kg", "0.45359237"),
    ("gal", "l", "3.785411784"),
    ("ft", "m", "0.3048"),
    ("nmi", "km", "1.852"),
    ("oz", "g", "28.349523125"),
    ("yd", "m", "0.9144"),
)
_CONVERT = {
    "en": (
        (
            "Make a conversion table from {u} to {v} (1 {u} = {f} {v}): start at {a} {u}, go up in steps of {s} {u}, {k} rows, rounded to two decimals.",
            "need {u} -> {v} for {k} values please, first {a}? factor: 1 {u} = {f} {v}, then every {s} {u} after that, 2 decimals",
        ),
        "Each value in {u} is multiplied by {f} and rounded to two decimals.",
        "Between two rows the result grows by {s} × {f} = {d} {v} before rounding.",
    ),
    "it": (
        (
            "Prepara una tabella di conversione da {u} a {v} (1 {u} = {f} {v}): parti da {a} {u}, aumenta di {s} {u} alla volta, {k} righe, con due decimali.",
        ),
        "Ogni valore in {u} viene moltiplicato per {f} e arrotondato a due decimali.",
        "Da una riga alla successiva il risultato aumenta di {s} × {f} = {d} {v} prima dell'arrotondamento.",
    ),
    "pl": (
        (
            "Przygotuj tabelę przeliczeń z {u} na {v} (1 {u} = {f} {v}): pierwsza wartość {a} {u}, odstęp {s} {u}, liczba wierszy {k}, dwa miejsca po przecinku.",
        ),
        "Każdą wartość w {u} mnożymy przez {f} i zaokrąglamy do dwóch miejsc po przecinku.",
        "Między kolejnymi wierszami wynik rośnie o {s} × {f} = {d} {v} (przed zaokrągleniem).",
    ),
    "fr": (
        (
            "Fais un tableau de conversion de {u} en {v} (1 {u} = {f} {v}) : commence à {a} {u}, avance de {s} {u} en {s} {u}, {k} lignes, deux décimales.",
        ),
        "Chaque valeur en {u} est multipliée par {f} puis arrondie à deux décimales.",
        "D'une ligne à l'autre, le résultat augmente de {s} × {f} = {d} {v} avant arrondi.",
    ),
    "es": (
        (
            "Haz una tabla de conversión de {u} a {v} (1 {u} = {f} {v}): empieza en {a} {u}, aumenta de {s} en {s} {u}, {k} filas, con dos decimales.",
        ),
        "Cada valor en {u} se multiplica por {f} y se redondea a dos decimales.",
        "De una fila a la siguiente el resultado aumenta en {s} × {f} = {d} {v} antes de redondear.",
    ),
    "de": (
        (
            "Erstelle eine Umrechnungstabelle von {u} in {v} (1 {u} = {f} {v}): Beginn bei {a} {u}, Schrittweite {s} {u}, {k} Zeilen, zwei Nachkommastellen.",
        ),
        "Jeder Wert in {u} wird mit {f} multipliziert und auf zwei Nachkommastellen gerundet.",
        "Von Zeile zu Zeile wächst das Ergebnis vor dem Runden um {s} × {f} = {d} {v}.",
    ),
    "nl": (
        (
            "Maak een omrekentabel van {u} naar {v} (1 {u} = {f} {v}): begin bij {a} {u}, ga omhoog in stappen van {s} {u}, {k} rijen, twee decimalen.",
        ),
        "Elke waarde in {u} wordt met {f} vermenigvuldigd en op twee decimalen afgerond.",
        "Van rij tot rij neemt het resultaat vóór afronding toe met {s} × {f} = {d} {v}.",
    ),
}
_CENT = Decimal("0.01")


def conversion(rng: random.Random, language: str, budget: int) -> Draft:
    """Return a table of unit conversions by an exact factor."""
    unit, target, factor = rng.choice(_UNITS)
    start, step = rng.randrange(2, 400), rng.randrange(2, 60)
    queries, opening, closing = _CONVERT[language]

    def steps() -> Iterator[Step]:
        value = start
        while True:
            exact = value * Decimal(factor)
            rounded = exact.quantize(_CENT, ROUND_HALF_UP)
            yield Step(
                f"{value} {unit}: {value} × {factor} = {exact}, rounded {rounded} {target}",
                f"{value} {unit} × {number(factor, language)} ≈ {number(rounded, language)} {target}",
            )
            value += step

    taken = take(steps(), int(0.96 * budget) - 280)
    count = len(taken)
    words = {
        "u": unit, "v": target, "a": start, "s": step, "k": count,
        "f": number(factor, language), "d": number(step * Decimal(factor), language),
    }  # fmt: skip
    end = start + step * (count - 1)
    return Draft(
        rng.choice(queries).format(**words),
        reasoning(
            f"Convert {count} values from {unit} to {target}: {start}, {start + step}, … up to {end}. Factor: 1 {unit} = "
            f"{factor} {target}, which is exact.",
            "Multiply each value by the factor without rounding, then round the product once to two decimals (half up). "
            "Rounding the factor first would let the error grow with the value.",
            [line.working for line in taken],
            f"The last value must be {start} + {count - 1} × {step} = {end}, and it is. The exact increments are constant: "
            f"{step} × {factor} = {step * Decimal(factor)}.",
            language,
            f"The table has {count} rows and ends at {end} {unit}.",
            brief=budget < BRIEF,
        ),
        answer(opening.format(**words), [line.result for line in taken], closing.format(**words)),
    )


_WEEKDAYS = {
    "en": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "it": ("lunedì", "martedì", "mercoledì", "giovedì", "venerdì", "sabato", "domenica"),
    "pl": ("poniedziałek", "wtorek", "środa", "czwartek", "piątek", "sobota", "niedziela"),
    "fr": ("lundi", "mardi", "mercredi", "jeudi", "vendredi", "samedi", "dimanche"),
    "es": ("lunes", "martes", "miércoles", "jueves", "viernes", "sábado", "domingo"),
    "de": ("Montag", "Dienstag", "Mittwoch", "Donnerstag", "Freitag", "Samstag", "Sonntag"),
    "nl": ("maandag", "dinsdag", "woensdag", "donderdag", "vrijdag", "zaterdag", "zondag"),
}
_DATES = {
    "en": (
        (
            "{start} is a {day}. Something happens every {d} days after it. Give me the next {k} dates with their weekdays.",
            "Our meeting on {start} ({day}) repeats every {d} days - what are the following {k} dates, and on which weekday does each fall?",
        ),
        "Counting on from {start} in steps of {d} days gives these dates (year-month-day):",
        "The last of these dates is {n} days after {start}.",
    ),
    "it": (
        (
            "Il giorno {start} è {day}. In seguito un evento si ripete ogni {d} giorni. Elenca le {k} date successive con il giorno della settimana.",
        ),
        "A partire dal giorno {start}, aggiungendo ogni volta {d} giorni, si ottengono queste date (anno-mese-giorno):",
        "L'ultima di queste date cade {n} giorni dopo il giorno {start}.",
    ),
    "pl": (
        (
            "Dzień {start} to {day}. Potem wydarzenie powtarza się co {d} dni. Podaj kolejne daty (łącznie {k}) wraz z dniami tygodnia.",
        ),
        "Licząc od dnia {start} co {d} dni, otrzymujemy następujące daty (rok-miesiąc-dzień):",
        "Liczba dni od {start} do ostatniej z tych dat: {n}.",
    ),
    "fr": (
        (
            "Le {start} est un {day}. Un événement se répète ensuite tous les {d} jours. Donne les {k} dates suivantes avec leur jour de la semaine.",
        ),
        "En comptant à partir du {start} par pas de {d} jours, on obtient ces dates (année-mois-jour) :",
        "La dernière de ces dates tombe {n} jours après le {start}.",
    ),
    "es": (
        (
            "El {start} es {day}. Un evento se repite después cada {d} días. Da las {k} fechas siguientes con su día de la semana.",
        ),
        "Contando desde el {start} de {d} en {d} días se obtienen estas fechas (año-mes-día):",
        "La última de estas fechas cae {n} días después del {start}.",
    ),
    "de": (
        (
            "Der {start} ist ein {day}. Danach wiederholt sich ein Termin alle {d} Tage. Nenne die nächsten {k} Termine mit Wochentag.",
        ),
        "Zählt man vom {start} in Schritten von {d} Tagen weiter, ergeben sich diese Daten (Jahr-Monat-Tag):",
        "Das letzte dieser Daten liegt {n} Tage nach dem {start}.",
    ),
    "nl": (
        (
            "{start} is een {day}. Daarna herhaalt een afspraak zich om de {d} dagen. Geef de volgende {k} datums met de dag van de week.",
        ),
        "Tellend vanaf {start} in stappen van {d} dagen krijg je deze datums (jaar-maand-dag):",
        "De laatste van deze datums valt {n} dagen na {start}.",
    ),
}


def dates(rng: random.Random, language: str, budget: int) -> Draft:
    """Repeated addition of days over month ends, with weekdays by remainder mod 7."""
    start = datetime.date(rng.randrange(2015, 2035), rng.randrange(1, 13), rng.randrange(1, 29))
    interval = rng.randrange(8, 75)
    names = _WEEKDAYS[language]

    def steps() -> Iterator[Step]:
        date = start
        while True:
            after = date + datetime.timedelta(days=interval)
            weekday = f"({date.weekday()} + {interval}) mod 7 = {after.weekday()}"
            yield Step(
                f"{_carry(date, interval)}: {after}; {weekday}, {_WEEKDAYS['en'][after.weekday()]}",
                f"{date} + {interval} → **{after}** ({names[after.weekday()]})",
            )
            date = after

    taken = take(steps(), budget - 310)
    count = len(taken)
    queries, opening, closing = _DATES[language]
    words = {"start": start, "day": names[start.weekday()], "d": interval, "k": count, "n": interval * count}
    end = start + datetime.timedelta(days=interval * count)
    return Draft(
        rng.choice(queries).format(**words),
        reasoning(
            f"Start {start}, interval {interval} days, {count} further dates with weekdays.",
            "Add the interval to the day of the month; while the sum exceeds the length of the month, subtract that "
            "length and move to the next month. February has 29 days in leap years. Weekdays: Monday is 0, Sunday is 6, and the "
            f"number moves by the remainder of the interval: {interval} mod 7 = {interval % 7}.",
            [step.working for step in taken],
            f"In total {count} × {interval} = {count * interval} days are added. Weekday of the last date from the start: "
            f"({start.weekday()} + {count * interval}) mod 7 = {end.weekday()}, a {_WEEKDAYS['en'][end.weekday()]}, the same as above.",
            language,
            f"The last date is {end}.",
            brief=budget < BRIEF,
        ),
        answer(
            opening.format(**words), [step.result for step in taken], closing.format(**words), numbered=True
        ),
    )


def _carry(date: datetime.date, interval: int) -> str:
    year, month = date.year, date.month
    day = date.day + interval
    parts = [f"{date.day} + {interval} = {day}"]
    while day > (length := calendar.monthrange(year, month)[1]):
        parts.append(f"{calendar.month_name[month]} has {length}, {day} − {length} = {day - length}")
        day -= length
        year, month = (year, month + 1) if month < 12 else (year + 1, 1)
    return "; ".join(parts)


_SAVINGS = {
    "en": (
        (
            "A savings account starts with {p} euros and pays {r} % interest at the end of each year, rounded down to the cent. Right after that, {d} euros are paid in. What is the balance after {k} years?",
            "I've {p} euros saved at {r}% a year (interest rounded down to cents, credited yearly) and add {d} euros every year right after the interest. How much is there after {k} years?",
        ),
        "Year",
        "Each year the interest is added first, then the deposit of {d} euros:",
        "After {k} years the balance is **{last} euros**, of which {paid} euros were paid in and {interest} euros are interest.",
    ),
    "it": (
        (
            "Un conto di risparmio parte con {p} euro e rende il {r} % alla fine di ogni anno, arrotondato per difetto al centesimo. Subito dopo si versano {d} euro. Quanto c'è sul conto dopo {k} anni?",
        ),
        "Anno",
        "Ogni anno si aggiungono prima gli interessi e poi il versamento di {d} euro:",
        "Dopo {k} anni il saldo è di **{last} euro**: {paid} euro versati e {interest} euro di interessi.",
    ),
    "pl": (
        (
            "Na koncie oszczędnościowym jest {p} euro. Pod koniec każdego roku doliczane są odsetki w wysokości {r} %, zaokrąglone w dół do centa, a zaraz potem wpłacane jest {d} euro. Liczba lat: {k}. Jakie jest saldo końcowe?",
        ),
        "Rok",
        "Co roku najpierw doliczamy odsetki, a potem wpłatę w wysokości {d} euro:",
        "Saldo końcowe (liczba lat: {k}) wynosi **{last} euro**, w tym wpłaty {paid} euro i odsetki {interest} euro.",
    ),
    "fr": (
        (
            "Un compte d'épargne contient {p} euros au départ et rapporte {r} % à la fin de chaque année, arrondi au centime inférieur. Juste après, on verse {d} euros. Quel est le solde après {k} ans ?",
        ),
        "Année",
        "Chaque année, on ajoute d'abord les intérêts, puis le versement de {d} euros :",
        "Après {k} ans, le solde est de **{last} euros**, dont {paid} euros versés et {interest} euros d'intérêts.",
    ),
    "es": (
        (
            "Una cuenta de ahorro empieza con {p} euros y da un {r} % de interés al final de cada año, redondeado hacia abajo al céntimo. Justo después se ingresan {d} euros. ¿Qué saldo hay después de {k} años?",
        ),
        "Año",
        "Cada año se suman primero los intereses y después el ingreso de {d} euros:",
        "Después de {k} años el saldo es de **{last} euros**: {paid} euros ingresados y {interest} euros de intereses.",
    ),
    "de": (
        (
            "Ein Sparkonto beginnt mit {p} Euro und bringt am Ende jedes Jahres {r} % Zinsen, auf Cent abgerundet. Direkt danach werden {d} Euro eingezahlt. Wie hoch ist der Kontostand nach {k} Jahren?",
        ),
        "Jahr",
        "In jedem Jahr kommen zuerst die Zinsen und dann die Einzahlung von {d} Euro hinzu:",
        "Nach {k} Jahren beträgt der Kontostand **{last} Euro**, davon {paid} Euro Einzahlungen und {interest} Euro Zinsen.",
    ),
    "nl": (
        (
            "Een spaarrekening begint met {p} euro en geeft aan het eind van elk jaar {r} % rente, naar beneden afgerond op centen. Direct daarna wordt {d} euro gestort. Hoeveel staat er na {k} jaar op de rekening?",
        ),
        "Jaar",
        "Elk jaar komt eerst de rente erbij en daarna de storting van {d} euro:",
        "Na {k} jaar is het saldo **{last} euro**, waarvan {paid} euro is gestort en {interest} euro rente is.",
    ),
}


def savings(rng: random.Random, language: str, budget: int) -> Draft:
    """Yearly interest, rounded down to the cent, and a yearly deposit."""
    start, deposit = 50 * rng.randrange(4, 200), 10 * rng.randrange(2, 90)
    rate = Decimal(rng.randrange(4, 28)) / 4
    queries, year_word, opening, closing = _SAVINGS[language]
    balances = [Decimal(start).quantize(_CENT)]

    def steps() -> Iterator[Step]:
        while True:
            before = balances[-1]
            exact = (before * rate / 100).normalize()
            interest = exact.quantize(_CENT, ROUND_DOWN)
            after = before + interest + deposit
            balances.append(after)
            total = f"{before} + {interest} + {deposit} = {after}"
            yield Step(
                f"Year {len(balances) - 1}: {before} × {rate} ÷ 100 = {exact:f}, so {interest}; {total}",
                f"{year_word} {len(balances) - 1}: {number(total, language)}",
            )

    taken = take(steps(), budget - 330)
    count = len(taken)
    del balances[count + 1 :]
    paid = start + count * deposit
    earned = balances[-1] - paid
    words = {
        "p": start, "r": number(rate.normalize(), language), "d": deposit, "k": count,
        "last": number(balances[-1], language), "paid": paid, "interest": number(earned, language),
    }  # fmt: skip
    return Draft(
        rng.choice(queries).format(**words),
        reasoning(
            f"Initial balance {start}, yearly rate {rate} %, yearly deposit {deposit}, {count} years.",
            "Within a year the order is: interest on the balance of the year before, rounded down to the cent, then the "
            "deposit. The deposit of a year earns nothing in that year.",
            [step.working for step in taken],
            f"Paid in: {start} + {count} × {deposit} = {paid}. Interest is what remains: {balances[-1]} − {paid} = {earned}. "
            "It is positive and grows from year to year, as it must.",
            language,
            f"Balance after {count} years: {balances[-1]} euros.",
            brief=budget < BRIEF,
        ),
        answer(opening.format(**words), [step.result for step in taken], closing.format(**words)),
    )
