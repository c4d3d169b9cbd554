/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_ALIVE_H
#define SNIFFER_ALIVE_H

#include <linux/compiler.h>
#include <linux/jump_label.h>
#include <linux/types.h>

/*
 * Do the needed probes fire? For kprobes the last canary decides. Like the next, written
 * by probes.c alone and read by everybody without a lock.
 */
extern bool sniffer_alive_names;
/* Is the release of every socket seen? Set at load, cleared at unload. */
extern bool sniffer_alive_release;

/*
 * enum sniffer_probe: all probes that have fired since load. Handlers write it; bits
 * are only set.
 */
extern u32 sniffer_alive_fired;

static inline void sniffer_alive_note(u32 bit)
{
	/* a race can lose a bit until the next call: harmless */
	if (unlikely(!(READ_ONCE(sniffer_alive_fired) & bit)))
		WRITE_ONCE(sniffer_alive_fired, sniffer_alive_fired | bit);
}

/* Does anybody listen for packets? listen.c alone writes it. */
DECLARE_STATIC_KEY_FALSE(sniffer_listening);

/* Do all the probes fire that the owner table needs to be right? */
static inline bool sniffer_probes_alive(void)
{
	return READ_ONCE(sniffer_alive_names);
}

/* Is the release of every socket seen? If not, nobody may keep the address of its file. */
static inline bool sniffer_probes_tell_release(void)
{
	return READ_ONCE(sniffer_alive_release);
}

#endif /* SNIFFER_ALIVE_H */
