"""The tag languages that models speak: parse, render, validate. One definition each, used by all parts."""
