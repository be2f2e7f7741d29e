"""Every error fedkola raises on purpose. One exit code per branch; messages say what was given,
what was expected and what to do.

::

    FedKolaError
    ├ PlanError(ValueError)    2   refused before round 1
    │ ├ UnknownKey                 a key of the plan that does not exist; names the nearest one
    │ ├ UnknownName                a name that is in no closed table
    │ ├ Incompatible               parts of the plan that cannot hold together
    │ ├ GridOverflow               a sum that could leave its word
    │ └ BudgetUnreachable          an epsilon that no reasonable noise can keep
    ├ SiteError                3   something at one site
    │ ├ DataError                  unreadable, empty or malformed records
    │ ├ ModelMismatch              another base model, tokenizer or catalogue than the plan names
    │ ├ StepFailed                 a client step raised
    │ └ NotFinite                  NaN or infinity in an addend; it stops at its site
    ├ PolicyRefused            4   a site declined
    ├ PrivacyError             5
    │ ├ BudgetExhausted            a round that would spend more epsilon than a site has left
    │ ├ UpdateHidden               a single update was asked for where only sums may be seen
    │ ├ GuardMissing               a guard the plan demands is not there
    │ ├ AccessRefused              a module that this site may not hold
    │ └ SurvivorsChanged           fewer sites answered than were counted
    ├ RoundError               6
    │ ├ CohortTooSmall             fewer sites than the plan's minimum
    │ └ StaleUpdate                an answer to another round
    ├ EngineError              7
    │ ├ Unreachable                no site could be reached
    │ ├ WireError                  bytes that are not a message
    │ └ VersionMismatch            bytes of another wire version
    ├ LedgerError              8
    │ ├ RunNotFound                no such run in this folder
    │ ├ ChainBroken                the event chain does not verify
    │ ├ BlobMissing                a tensor file is absent or altered
    │ └ TranscriptMissing          nothing was recorded of this run, or not of this round
    ├ KnowledgeError           9
    │ ├ UnknownCell                no such cell, module or label in the bank
    │ ├ CellTooSmall               below the floors of sites or records
    │ ├ BasisMismatch              another basis, recipe or slot
    │ └ ForgetIncomplete           a removal that could not be finished
    └ ReleaseRefused          10   the release gate: the measure, its value, its bound
"""

from typing import ClassVar


class FedKolaError(Exception):
    """``code`` names the rule that refused, where a class has several; a report shows it."""

    exit_code: ClassVar[int] = 1

    def __init__(self, *args: object, code: str = "") -> None:
        super().__init__(*args)
        self.code = code


class PlanError(FedKolaError, ValueError):
    exit_code = 2


class UnknownKey(PlanError):
    pass


class UnknownName(PlanError):
    pass


class Incompatible(PlanError):
    pass


class GridOverflow(PlanError):
    pass


class BudgetUnreachable(PlanError):
    pass


class SiteError(FedKolaError):
    exit_code = 3


class DataError(SiteError):
    pass


class ModelMismatch(SiteError):
    pass


class StepFailed(SiteError):
    pass


class NotFinite(SiteError):
    pass


class PolicyRefused(FedKolaError):
    exit_code = 4


class PrivacyError(FedKolaError):
    exit_code = 5


class BudgetExhausted(PrivacyError):
    pass


class UpdateHidden(PrivacyError):
    pass


class GuardMissing(PrivacyError):
    pass


class AccessRefused(PrivacyError):
    pass


class SurvivorsChanged(PrivacyError):
    pass


class RoundError(FedKolaError):
    exit_code = 6


class CohortTooSmall(RoundError):
    pass


class StaleUpdate(RoundError):
    pass


class EngineError(FedKolaError):
    exit_code = 7


class Unreachable(EngineError):
    pass


class WireError(EngineError):
    pass


class VersionMismatch(EngineError):
    pass


class LedgerError(FedKolaError):
    exit_code = 8


class RunNotFound(LedgerError):
    pass


class ChainBroken(LedgerError):
    pass


class BlobMissing(LedgerError):
    pass


class TranscriptMissing(LedgerError):
    pass


class KnowledgeError(FedKolaError):
    exit_code = 9


class UnknownCell(KnowledgeError):
    pass


class CellTooSmall(KnowledgeError):
    pass


class BasisMismatch(KnowledgeError):
    pass


class ForgetIncomplete(KnowledgeError):
    pass


class ReleaseRefused(FedKolaError):
    exit_code = 10
