"""What every statement says in the same words. Changing a sentence here changes what sites sign."""

from __future__ import annotations

DEFINITION = (
    "Whatever is sent from this site, an observer with any other knowledge learns nearly the same whether or not one "
    "privacy unit is in the data: for every set of outputs, its probability with the unit is at most e^epsilon times "
    "its probability without it, plus delta (and the other way round)."
)
MEANING = (
    (
        "Epsilon and delta limit what anybody can learn about one {unit} from everything that leaves this site. "
        "Whatever somebody may look for in it, the chance of finding it is at most e^epsilon times what it would be if "
        "that {unit} were not in the data, plus delta; and the same holds the other way round. Epsilon 0 would mean "
        "that nothing can be learnt; each step that is computed on the data adds to it. The bound holds whatever else "
        "the observer knows, and whatever computing power he has."
    ),
    (
        "Delta is the room left for rare events that the factor e^epsilon does not cover. It is kept below 1 divided "
        "by the number of units: at 1/units it would allow to publish one of them outright."
    ),
)
EXAMPLE = (
    "For example: a fair coin decides in secret whether one {unit} is put into the data. Somebody who knows everything "
    "else, and sees everything that leaves, guesses how it fell. By pure chance the guess is right in 50 % of all "
    "cases; the best possible guess is right in at most {ceiling} at the ceiling (epsilon {epsilon:g}: a factor of "
    "{factor}), and in at most {so_far} after what was charged so far (epsilon {spent:.4g}). These are bounds that "
    "nobody can exceed, not what an attack is known to reach."
)
TWO_SHARES = (
    "Why epsilon stands at {share} of the ceiling and the gate at {gate}. Both measure the same charges against the "
    "same ceiling, in different units. The gate adds up Rényi divergence, of which every step of a kind takes the same "
    "share whenever it runs; at 100 % it grants nothing more. It decides, and it includes {held} held by open rounds. "
    "Epsilon is translated from that divergence, and the translation itself costs a part that is due in full as soon "
    "as anything is charged. So epsilon rises fast at first and slowly later, and the two come together where the "
    "budget ends. To see how much can still be done, read the gate's figure; to see what is guaranteed so far, read "
    "epsilon. The figure by privacy loss distributions ({pld}) is a tighter translation of the same charges and "
    "decides nothing."
)
SIGN = (
    "By signing, the persons below confirm that they have read this statement. The figures need no signature by hand: "
    "they are covered by the site's electronic signature on the last page."
)
SIGNERS = ("For the site", "Data protection officer")
NEIGHBOURING = "add or remove one privacy unit, with all of its records that are in use"
TRUST_MODEL = (
    "Central model at each site: the site trusts its own agent, machine and staff and nobody else. Coordinator, other "
    "sites and readers of the final model are assumed to collude and to see everything that leaves. Updates leave "
    "noised; the guarantee does not rest on secure aggregation or on the coordinator's good behaviour."
)
COMPOSITION = (
    "All mechanisms ever run on the data set, in every run and study, compose. A mechanism is granted only while a "
    "Rényi filter at an order that was fixed with the budget stays within its bound (Feldman and Zrnic 2021, "
    "arXiv 2008.11193), which holds although later runs are chosen after seeing the results of earlier ones. The "
    "tighter figure by privacy loss distributions stands beside it; it is proven for parameters fixed in advance and "
    "decides nothing."
)
MECHANISM = (
    "DP-SGD (arXiv 1607.00133): in each step units are drawn by Poisson sampling with probability q, each unit's whole "
    "gradient is clipped to L2 norm C, Gaussian noise of standard deviation sigma x C is added to the sum. Empty "
    "batches are noised, counted and charged like any other."
)
RANDOMNESS = (
    "Sampling and noise come from a stream cipher seeded by the operating system for each round. The noise is a "
    "discrete Gaussian on a fixed-point grid; the rounding of the gradient to that grid is counted in its "
    "sensitivity, so floating-point attacks (Mironov 2012) have nothing to read."
)
PUBLIC = (
    "NO PRIVACY GUARANTEE: this data set is declared public and was trained on without clipping and noise. Figures "
    "below describe the mechanism that was asked for and protect nobody."
)

# What a spend's outcome means for the charge.
OUTCOMES = {
    "settled": "charged with what was executed; its output left",
    "in-doubt": "charged in full, because data was read or output may have left",
    "released": "not charged; recorded state proves that no private data was read",
    "open": "held in full until it ends",
}

OUTSIDE = (
    "Whoever can read the agent's memory or the data file: access control at the site.",
    "Facts about a population that hold whether or not one unit is in the data.",
    "Several units that belong to one person, where the unit is a record.",
    "The same person at several sites or in data sets whose overlap was not declared: guarantees then add up.",
    (
        "What is public by decision: names of site, runs and data sets, label set, base model, sizes and times of "
        "updates, the number of units (unless a public round figure is configured), refusals and their public reason."
    ),
    (
        "A ceiling that was raised because of results: the guarantee is then that of the highest ceiling that could "
        "have been approved."
    ),
    "Timing and hardware side channels beyond that.",
    "Choices made outside the ledger: cleaning, selecting or tuning by hand after looking at the data.",
)

NOT_CLAIMED = (
    "That the data is anonymous in the sense of any law. That is a determination for the controller and its experts.",
    "That the model is accurate, fair or fit for a purpose.",
    "That the base model's pre-training was private.",
    "That epsilon and delta of this size are appropriate here: that was the approver's decision.",
    "That the empirical audit, where one is shown, proves privacy: it bounds epsilon from below only.",
    "That site staff, hardware or operating system were not compromised.",
)

# (what NIST SP 800-226 asks to be told, where it stands)
NIST = (
    ("Unit of privacy and bound on its contribution", "Guarantee; Data sets and budgets"),
    ("Neighbouring relation", "Guarantee"),
    ("Epsilon and delta, for each release and cumulative", "Data sets and budgets; Runs; Curves"),
    ("Delta against the number of units", "Data sets and budgets"),
    ("Trust model", "Guarantee"),
    ("Mechanisms and their parameters", "Mechanisms"),
    ("Sampling as claimed and as executed", "Mechanisms"),
    ("Composition and accountants", "Guarantee; Accountants and versions"),
    ("Meaning in words", "What epsilon means"),
    ("Randomness and floating point", "Randomness"),
    ("Failures, restarts and what they cost", "Failures and how each was charged"),
    ("Side channels, access control, data collection exposure", "Outside the guarantee"),
    ("Testing by attack", "Empirical audit"),
)

# (provision, what it asks, what here serves it, what stays with the site)
CROSSWALK = (
    (
        "HIPAA 45 CFR 164.514(b)(1)",
        "An expert determines that the risk of identification is very small, and documents methods and results",
        "A documented method with a bound on what any release adds to the risk; results per run and in all",
        "The expert's determination, with regard to the recipient and to other available data",
    ),
    (
        "GDPR article 5(2)",
        "The controller is able to demonstrate compliance (accountability)",
        "An append-only, signed record that a third party recomputes with public keys alone",
        "Lawfulness, purpose limitation and all other principles",
    ),
    (
        "GDPR article 30",
        "Records of processing activities",
        "Every use of a data set with time, run, purpose and study",
        "Categories of data subjects and recipients, retention, legal basis",
    ),
    (
        "GDPR article 35",
        "Data protection impact assessment: risks and the measures against them",
        "A measured bound on disclosure through releases, and what lies outside it",
        "The assessment itself, and risks other than disclosure through releases",
    ),
    (
        "EU AI Act article 10",
        "Data governance for training data",
        "Fingerprint, version, unit and size of each data set, and which run used which version",
        "Relevance, representativeness, errors, bias",
    ),
    (
        "EU AI Act article 11",
        "Technical documentation",
        "Mechanisms, parameters, digests of base model, spec, updates and code",
        "The rest of annex IV",
    ),
    (
        "EU AI Act article 12",
        "Automatic recording of events (logs)",
        "A time-stamped, hash-chained entry before each release, checkpointed with the coordinator",
        "Logs of the system in operation after training",
    ),
)
