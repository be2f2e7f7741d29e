"""Where sites live. Every engine carries the same bytes; algorithms cannot tell them apart."""
