/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_ALIVE_H
#define SNIFFER_ALIVE_H

#include <linux/compiler.h>
#include <linux/jump_label.h>
#include <linux/types.h>

/* What the owner table is told of. Written by probes.c alone, read by everybody without a lock. */
extern bool sniffer_alive_names;	/* all that names need; by the last canary, if by kprobes */
extern bool sniffer_alive_release;	/* the end of each socket's file, without fail; set at load, cleared at unload */

/* enum sniffer_probe of all that fired since load. Written by whoever is told; only gains bits. */
extern u32 sniffer_alive_fired;

static inline void sniffer_alive_note(u32 bit)
{
	/* a race can lose a bit until the next time: nobody minds */
	if (unlikely(!(READ_ONCE(sniffer_alive_fired) & bit)))
		WRITE_ONCE(sniffer_alive_fired, sniffer_alive_fired | bit);
}

/* Does anybody listen for packets? Written by listen.c alone. */
DECLARE_STATIC_KEY_FALSE(sniffer_listening);

/* Do all those probes fire that the owner table needs to be right? */
static inline bool sniffer_probes_alive(void)
{
	return READ_ONCE(sniffer_alive_names);
}

/* Is the end of each socket's file told without fail? Else nobody may remember its address. */
static inline bool sniffer_probes_tell_release(void)
{
	return READ_ONCE(sniffer_alive_release);
}

#endif /* SNIFFER_ALIVE_H */
