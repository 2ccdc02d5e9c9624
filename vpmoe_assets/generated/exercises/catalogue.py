"""The exercises that the generator draws from; their order and their limits are part of what it writes."""

from vpmoe_assets.generated.exercises.draft import Exercise
from vpmoe_assets.generated.exercises.ordering import insertion_sort, ranking, shifted_alphabet
from vpmoe_assets.generated.exercises.quantities import conversion, dates, savings
from vpmoe_assets.generated.exercises.reading import facts, table
from vpmoe_assets.generated.exercises.sequences import equations, iterated_rule, number_bases, prime_factors

EXERCISES = (
    Exercise("iterated rule", iterated_rule, 4000),
    Exercise("prime factors", prime_factors, 4000),
    Exercise("number bases", number_bases, 1600),
    Exercise("equations", equations, 900),
    Exercise("unit conversion", conversion, 4000),
    Exercise("dates", dates, 4000),
    Exercise("savings", savings, 4000),
    Exercise("sorting", insertion_sort, 1500),
    Exercise("cipher", shifted_alphabet, 1500),
    Exercise("ranking", ranking, 1000),
    Exercise("table reading", table, 850),
    Exercise("fact extraction", facts, 700),
)
