"""WHO Disease Outbreak News 1996-2018 as it came: which disease does a report tell of?

Source: the reports of the World Health Organization as collected by Torres Munguia et al., A global
dataset of pandemic- and epidemic-prone disease outbreaks, Scientific Data 2022; labels are an
automatic mapping to ICD-11, and about 4 % of the reports have none. A report of one disease is a
record; the label is the disease, below a group (the block of ICD-11). Sites are the six regions of
the WHO, or parts of them by country; a report of several regions is at the one with most of its
countries. Windows are years or quarters of the calendar.

*Test before training.* Every report is asked about once, before anybody learns it: a report of
window w is a test record of window w - 1 alone (``windows`` and ``ends`` are both w - 1) and a
training record of window w. Reports of the first window are not asked about. A disease that nobody
has reported before is a miss, and counts. The concept of a test record is the year of its report.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedkola.errors import DataError, PlanError
from fedkola.evaluation.tasks import corpora
from fedkola.evaluation.tasks.corpora import TRAIN, Row
from fedkola.knowledge.stream import Stream
from fedkola.plan import Task
from fedkola.quality.intake import plain
from fedkola.types import Catalogue, Label

NAME = "who_don"
FILE = "don_1996_2018.jsonl.gz"
LEVELS = ("disease", "group")
SCOPE = "who-don"
REGIONS: Mapping[str, frozenset[str]] = {
    name: frozenset(codes.split())
    for name, codes in {
        "africa": "AGO BDI BEN BFA BWA CAF CIV CMR COD COG COM CPV DZA ERI ETH GAB GHA GIN GMB GNB "
        "GNQ KEN LBR LSO MDG MLI MOZ MRT MUS MWI MYT NAM NER NGA REU RWA SEN SHN SLE SSD STP SWZ "
        "SYC TCD TGO TZA UGA ZAF ZMB ZWE",
        "americas": "ABW AIA ARG ATG BES BHS BLM BLZ BMU BOL BRA BRB CAN CHL COL CRI CUB CUW CYM "
        "DMA DOM ECU FLK GLP GRD GTM GUF GUY HND HTI JAM KNA LCA MAF MEX MSR MTQ NIC PAN PER PRI "
        "PRY SLV SPM SUR SXM TCA TTO URY USA VCT VEN VGB VIR",
        "eastern-mediterranean": "AFG ARE BHR DJI EGY IRN IRQ JOR KWT LBN LBY MAR OMN PAK PSE QAT "
        "SAU SDN SOM SYR TUN YEM",
        "europe": "ALB AND ARM AUT AZE BEL BGR BIH BLR CHE CYP CZE DEU DNK ESP EST FIN FRA FRO GBR "
        "GEO GGY GIB GRC GRL HRV HUN IMN IRL ISL ISR ITA JEY KAZ KGZ LIE LTU LUX LVA MCO MDA MKD "
        "MLT MNE NLD NOR POL PRT ROU RUS SMR SRB SVK SVN SWE TJK TKM TUR UKR UZB VAT XXK",
        "south-east-asia": "BGD BTN IDN IND LKA MDV MMR NPL PRK THA TLS",
        "western-pacific": "ASM AUS BRN CHN COK FJI FSM GUM HKG JPN KHM KIR KOR LAO MAC MHL MNG "
        "MNP MYS NCL NIU NRU NZL PHL PLW PNG PYF SGP SLB TKL TON TUV TWN VNM VUT WLF WSM",
    }.items()
}


def load(task: Task, *, seed: int) -> Stream:
    """The stream of reports; reads ``level``, ``sites`` (6 or more), ``period`` and ``per_label``.

    Beyond six sites the regions with most reports are divided by country. The stream is the same
    for every seed. ``windows`` is not read.
    """
    if task.level not in ("", *LEVELS):
        raise PlanError(f"task.level = {task.level!r} is no level of {SCOPE}; set one of {LEVELS}")
    if task.sites < len(REGIONS):
        raise PlanError(f"task.sites = {task.sites}, but the WHO has {len(REGIONS)} regions")
    excluded = {TRAIN: Counter[str]()}
    read = corpora.read(
        corpora.folder(task, NAME) / FILE,
        "id",
        "date",
        "diseases",
        "icd11_block",
        "countries",
        "text",
    )
    reports = [report for row in read for report in _report(row, excluded[TRAIN])]
    if not reports:
        raise DataError(f"no report of one disease in {FILE}; copy the corpus again")
    usable = corpora.admitted(reports, excluded[TRAIN], text="text", label="disease")
    dates = [str(reports[i]["date"]) for i, _, _ in usable]
    windows = corpora.calendar(dates, task.period)
    number = {name: n for n, name in enumerate(windows, start=1)}
    train = [
        Row(
            record=str(reports[i]["id"]),
            text=text,
            label=label,
            site=str(reports[i]["country"]),
            window=number[corpora.within(date, task.period)],
        )
        for (i, text, label), date in zip(usable, dates, strict=True)
    ]
    homes, members = divided([row.site for row in train], task.sites)
    year = {row.record: date[:4] for row, date in zip(train, dates, strict=True)}
    train = [replace(row, site=homes[row.site]) for row in train]
    train, _, notices = corpora.capped(train, [], per_label=task.per_label, seed=seed)
    asked = [replace(row, window=row.window - 1) for row in train if row.window > 1]
    return corpora.stream(
        catalogue=_catalogue([(str(r["disease"]), str(r["group"])) for r in reports]),
        specialties=members,
        train=train,
        test=asked,
        windows=windows,
        excluded=excluded,
        notices=notices,
        ends={row.record: row.window for row in asked},
        concepts={row.record: year[row.record] for row in asked},
    )


def divided(countries: Sequence[str], sites: int) -> tuple[dict[str, str], dict[str, str]]:
    """The site of every country, one per report given, and what each site is.

    The region with most reports per site is divided once more until there are enough sites; its
    countries go, largest first, to the site that has fewest reports.
    """
    reports = Counter(countries)
    load = {region: sum(reports[country] for country in codes) for region, codes in REGIONS.items()}
    parts = dict.fromkeys(REGIONS, 1)
    for _ in range(sites - len(REGIONS)):
        parts[max(parts, key=lambda region: load[region] / parts[region])] += 1
    homes: dict[str, str] = {}
    members: dict[str, str] = {}
    for region, codes in REGIONS.items():
        names = [region] + [f"{region}-{k}" for k in range(2, parts[region] + 1)]
        own: Counter[str] = Counter(dict.fromkeys(names, 0))
        for country in sorted(codes, key=lambda c: (-reports[c], c)):
            homes[country] = min(names, key=lambda name: own[name])
            own[homes[country]] += reports[country]
        members |= {
            name: "WHO region " + region.replace("-", " ")
            if parts[region] == 1
            else ", ".join(c for c in sorted(codes) if homes[c] == name and reports[c])
            for name in names
        }
    return homes, members


def _report(row: Mapping[str, object], excluded: Counter[str]) -> list[dict[str, object]]:
    """The report with its one disease, its group and its country; nothing if it has none or more,
    counted."""
    diseases, groups, countries = (_list(row[k]) for k in ("diseases", "icd11_block", "countries"))
    region = max(REGIONS, key=lambda name: sum(c in REGIONS[name] for c in countries))
    home = [country for country in countries if country in REGIONS[region]]
    date = str(row["date"])
    problem = (
        ("no disease" if not diseases else "several diseases")
        if len(diseases) != 1
        else "no country of a WHO region"
        if not home
        else "bad date"
        if not corpora.is_date(date)
        else ""
    )
    if problem:
        excluded[problem] += 1
        return []
    told = {"id": row["id"], "date": date, "text": row["text"], "disease": diseases[0]}
    return [{**told, "group": groups[0] if groups else "unspecified", "country": home[0]}]


def _list(value: object) -> list[str]:
    found = [plain(item)[0] for item in value] if isinstance(value, list) else []
    return [item for item in found if item]


def _catalogue(pairs: Sequence[tuple[str, str]]) -> Catalogue:
    """Diseases below the group that they have most often."""
    groups: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for disease, group in pairs:
        groups[disease][group] += 1
    return Catalogue(
        system=SCOPE,
        levels=LEVELS,
        labels=tuple(
            Label(
                code=disease,
                path=(disease, max(sorted(counts), key=lambda g: counts[g])),
                scope=SCOPE,
            )
            for disease, counts in sorted(groups.items())
        ),
    )
