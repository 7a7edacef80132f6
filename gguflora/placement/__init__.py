"""An adapter fitted to one base: which delta changes which rows of which tensor, and what precedes the first token."""
