// SPDX-License-Identifier: GPL-2.0-only
/*
 * Records (and, for who asks for them, the packets' first bytes) gather per CPU
 * and leave as one Netlink message: when the batch is full, when its oldest
 * record has waited flush_ms, or when a reader asks.
 * All counting happens here too, beside the batch.
 */
#include <linux/cpu.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/percpu.h>
#include <linux/timekeeping.h>
#include <linux/timer.h>
#include <linux/workqueue.h>

#include "batch.h"
#include "netlink.h"

static unsigned int batch = SNIFFER_BATCH_DEFAULT;
module_param(batch, uint, 0444);
MODULE_PARM_DESC(batch, "records a message at most, 1 to 252 (default 124)");

static unsigned int flush_ms = SNIFFER_FLUSH_MS_DEFAULT;
module_param(flush_ms, uint, 0444);
MODULE_PARM_DESC(flush_ms, "milliseconds a record waits at most, 1 to 1000 (default 20)");

/* Bytes of snaps a message: as large as a default batch of records. */
#define BATCH_SNAP_ROOM	(SNIFFER_BATCH_DEFAULT * sizeof(struct sniffer_record))

/**
 * struct batch_stream - a message under construction, and where its sequence stands
 * @skb: the message, NULL when nothing waits
 * @head: its struct sniffer_batch, within @skb
 * @used: bytes after the head
 * @room: bytes that @skb was sized for
 * @batch_seq: of the next message
 * @seq: of the next record or snap
 * @lost: records or snaps that got no skb
 */
struct batch_stream {
	struct sk_buff *skb;
	struct sniffer_batch *head;
	unsigned int used;
	unsigned int room;
	u64 batch_seq;
	u64 seq;
	u64 lost;
};

/**
 * struct batch_cpu - one CPU's batches and counters
 * @lock: guards all below. Taken by the hooks of this CPU (process context or
 *	softirq), its timer, and flushes: _bh. In practice its own CPU only, so
 *	it is never contended; it is there for CPU hotplug, when a timer migrates.
 * @timer: pinned; runs while a batch waits
 * @records: for group packets
 * @snaps: for group snaps
 * @count: counters, by_how included; those the header wants are derived
 * @skipped: packets without a record, by cause; without the lock, this_cpu_inc()
 */
struct batch_cpu {
	spinlock_t lock;
	struct timer_list timer;
	struct batch_stream records;
	struct batch_stream snaps;
	struct sniffer_counters count;
	u64 skipped[SNIFFER_SKIPS];
};

static DEFINE_PER_CPU(struct batch_cpu, batch_cpus);
static u64 batch_instance;
static bool batch_stopped;

static u64 batch_skipped(const struct batch_cpu *cpu)
{
	u64 sum = 0;
	int i;

	for (i = 0; i < SNIFFER_SKIPS; i++)
		sum += cpu->skipped[i];
	return sum;
}

/* Under the lock. Return: 0, or an error when nobody got the message. */
static int batch_stream_send(struct batch_cpu *cpu, struct batch_stream *stream,
			     enum sniffer_group group)
{
	struct sniffer_batch *head = stream->head;
	struct sk_buff *skb = stream->skb;

	head->skipped = batch_skipped(cpu);
	head->packets = cpu->count.recorded + head->skipped;
	head->lost = stream->lost;
	head->mono_ns = ktime_get_ns();
	head->real_ns = ktime_get_real_ns();
	head->boot_ns = ktime_get_boottime_ns();
	stream->batch_seq++;
	stream->skb = NULL;
	return sniffer_netlink_send(skb, group, stream->used);
}

/* Under the lock. */
static void batch_send_records(struct batch_cpu *cpu)
{
	unsigned int count;

	if (!cpu->records.skb)
		return;
	count = cpu->records.head->count;
	cpu->count.batches++;
	if (batch_stream_send(cpu, &cpu->records, SNIFFER_GROUP_INDEX_PACKETS))
		cpu->count.lost_batch += count;
	else
		cpu->count.sent += count;
}

/* Under the lock. Records first: a reader joins a snap to the record it knows. */
static void batch_send(struct batch_cpu *cpu)
{
	batch_send_records(cpu);
	if (cpu->snaps.skb)
		batch_stream_send(cpu, &cpu->snaps, SNIFFER_GROUP_INDEX_SNAPS);
}

static void batch_expired(struct timer_list *timer)
{
	struct batch_cpu *cpu = container_of(timer, struct batch_cpu, timer);

	spin_lock_bh(&cpu->lock);
	batch_send(cpu);
	spin_unlock_bh(&cpu->lock);
}

/*
 * Under the lock. Return: @size bytes to be written at the end of
 * the stream's message, or NULL when there is no memory for one.
 */
static void *batch_stream_reserve(struct batch_cpu *cpu, struct batch_stream *stream,
				  unsigned int size, unsigned int room)
{
	bool records = stream == &cpu->records;
	void *data;

	if (!stream->skb) {
		stream->skb = sniffer_netlink_begin(records ? SNIFFER_A_RECORDS : SNIFFER_A_SNAPS,
						    records ? SNIFFER_CMD_PACKETS :
							      SNIFFER_CMD_SNAPS,
						    sizeof(*stream->head), room,
						    (void **)&stream->head);
		if (!stream->skb) {
			stream->seq++;
			stream->lost++;
			return NULL;
		}
		memset(stream->head, 0, sizeof(*stream->head));
		stream->head->version = SNIFFER_VERSION;
		stream->head->record_size = records ? size : 0;
		stream->head->cpu = smp_processor_id();
		stream->head->instance = batch_instance;
		stream->head->batch_seq = stream->batch_seq;
		stream->head->record_seq = stream->seq;
		stream->used = 0;
		stream->room = room;
		if (!timer_pending(&cpu->timer) && !READ_ONCE(batch_stopped))
			mod_timer(&cpu->timer,
				  jiffies + msecs_to_jiffies(READ_ONCE(flush_ms)));
	}
	data = (u8 *)(stream->head + 1) + stream->used;
	stream->used += size;
	stream->head->count++;
	stream->seq++;
	return data;
}

/**
 * sniffer_batch_skip - count a packet that gets no record
 * @why: the cause
 */
void sniffer_batch_skip(enum sniffer_skip why)
{
	this_cpu_inc(batch_cpus.skipped[why]);
}

/**
 * sniffer_batch_add - hand a record on
 * @record: all but cpu and sequence, which are filled in here
 */
void sniffer_batch_add(struct sniffer_record *record)
{
	struct batch_cpu *cpu;
	void *data;

	local_bh_disable();
	cpu = this_cpu_ptr(&batch_cpus);
	spin_lock(&cpu->lock);

	record->cpu = smp_processor_id();
	record->seq = cpu->records.seq;
	cpu->count.records++;
	cpu->count.by_how[record->how]++;
	if (record->flags & SNIFFER_F_COPY) {
		cpu->count.copies++;
	} else {
		cpu->count.recorded++;
		cpu->count.wire_packets += record->gso_segs;
		cpu->count.wire_bytes += record->len + (record->gso_segs - 1) * record->hdr_len;
	}
	data = batch_stream_reserve(cpu, &cpu->records, sizeof(*record),
				    READ_ONCE(batch) * sizeof(*record));
	if (data) {
		memcpy(data, record, sizeof(*record));
		if (cpu->records.used >= cpu->records.room)
			batch_send_records(cpu);
	} else {
		cpu->count.lost_alloc++;
	}

	spin_unlock(&cpu->lock);
	local_bh_enable();
}

/**
 * sniffer_batch_snap - hand on the first bytes of a packet
 * @record: its record, after sniffer_batch_add()
 * @skb: the packet, data at the IP header
 */
void sniffer_batch_snap(const struct sniffer_record *record, const struct sk_buff *skb)
{
	unsigned int caplen = min_t(unsigned int, skb->len, SNIFFER_SNAP_LEN);
	unsigned int size = sizeof(struct sniffer_snap) + ALIGN(caplen, 8);
	struct sniffer_snap *snap;
	struct batch_cpu *cpu;

	local_bh_disable();
	cpu = this_cpu_ptr(&batch_cpus);
	spin_lock(&cpu->lock);

	if (cpu->snaps.skb && cpu->snaps.used + size > cpu->snaps.room)
		batch_send(cpu);
	snap = batch_stream_reserve(cpu, &cpu->snaps, size, BATCH_SNAP_ROOM);
	if (snap) {
		memset(snap, 0, size);
		snap->time_ns = record->time_ns;
		snap->seq = record->seq;
		snap->cpu = record->cpu;
		snap->len = record->len;
		if (!skb_copy_bits(skb, 0, snap + 1, caplen))
			snap->caplen = caplen;
	}

	spin_unlock(&cpu->lock);
	local_bh_enable();
}

struct batch_flush_work {
	struct work_struct work;
	struct sniffer_tail tail;
};

static void batch_flush_cpu(int id, struct sniffer_tail *tail)
{
	struct batch_cpu *cpu = per_cpu_ptr(&batch_cpus, id);

	spin_lock_bh(&cpu->lock);
	batch_send(cpu);
	tail->cpu = id;
	tail->batch_seq = cpu->records.batch_seq;
	tail->record_seq = cpu->records.seq;
	tail->skipped = batch_skipped(cpu);
	tail->packets = cpu->count.recorded + tail->skipped;
	tail->lost = cpu->records.lost;
	spin_unlock_bh(&cpu->lock);
}

static void batch_flush_here(struct work_struct *work)
{
	local_bh_disable();
	batch_flush_cpu(smp_processor_id(),
			&container_of(work, struct batch_flush_work, work)->tail);
	local_bh_enable();
}

/**
 * sniffer_batch_flush - send what waits on every CPU
 * @tails: filled with what each CPU has sent so far
 * @max: room in @tails
 *
 * Process context. Runs on each CPU itself, so that its counters stand still;
 * those of one that is offline do, but what it has sent is told as well.
 *
 * Return: number of tails.
 */
unsigned int sniffer_batch_flush(struct sniffer_tail *tails, unsigned int max)
{
	struct batch_flush_work work;
	unsigned int count = 0;
	int cpu;

	cpus_read_lock();
	for_each_possible_cpu(cpu) {
		if (count == max)
			break;
		memset(&work, 0, sizeof(work));
		if (!cpu_online(cpu)) {
			batch_flush_cpu(cpu, &work.tail);
			tails[count++] = work.tail;
			continue;
		}
		INIT_WORK_ONSTACK(&work.work, batch_flush_here);
		queue_work_on(cpu, system_highpri_wq, &work.work);
		flush_work(&work.work);
		destroy_work_on_stack(&work.work);
		tails[count++] = work.tail;
	}
	cpus_read_unlock();
	return count;
}

/**
 * sniffer_batch_counters - add up the counters of all CPUs
 * @sum: filled but for what the tables count
 */
void sniffer_batch_counters(struct sniffer_counters *sum)
{
	const u64 *from;
	u64 *to = (u64 *)sum;
	unsigned int i;
	int id;

	memset(sum, 0, sizeof(*sum));
	for_each_possible_cpu(id) {
		struct batch_cpu *cpu = per_cpu_ptr(&batch_cpus, id);

		spin_lock_bh(&cpu->lock);
		from = (const u64 *)&cpu->count;
		for (i = 0; i < sizeof(*sum) / sizeof(u64); i++)
			to[i] += from[i];
		sum->skipped_listener += cpu->skipped[SNIFFER_SKIP_LISTENER];
		sum->skipped_fragment += cpu->skipped[SNIFFER_SKIP_FRAGMENT];
		sum->skipped_truncated += cpu->skipped[SNIFFER_SKIP_TRUNCATED];
		sum->skipped_other += cpu->skipped[SNIFFER_SKIP_OTHER];
		sum->packets += cpu->count.recorded + batch_skipped(cpu);
		spin_unlock_bh(&cpu->lock);
	}
}

/**
 * sniffer_batch_size - records a message at most
 */
unsigned int sniffer_batch_size(void)
{
	return READ_ONCE(batch);
}

/**
 * sniffer_batch_flush_ms - milliseconds a record waits at most
 */
unsigned int sniffer_batch_flush_ms(void)
{
	return READ_ONCE(flush_ms);
}

/**
 * sniffer_batch_configure - change size and interval from the next batch on
 * @size: 1 to SNIFFER_BATCH_MAX
 * @interval: ms, 1 to SNIFFER_FLUSH_MS_MAX
 */
void sniffer_batch_configure(unsigned int size, unsigned int interval)
{
	WRITE_ONCE(batch, size);
	WRITE_ONCE(flush_ms, interval);
}

/**
 * sniffer_batch_instance - realtime ns of this load of the module
 */
u64 sniffer_batch_instance(void)
{
	return batch_instance;
}

int sniffer_batch_init(void)
{
	int id;

	if (batch < 1 || batch > SNIFFER_BATCH_MAX) {
		pr_err("sniffer: batch must be 1 to %u, not %u\n", SNIFFER_BATCH_MAX, batch);
		return -EINVAL;
	}
	if (flush_ms < 1 || flush_ms > SNIFFER_FLUSH_MS_MAX) {
		pr_err("sniffer: flush_ms must be 1 to %u, not %u\n", SNIFFER_FLUSH_MS_MAX,
		       flush_ms);
		return -EINVAL;
	}
	batch_instance = ktime_get_real_ns();
	for_each_possible_cpu(id) {
		struct batch_cpu *cpu = per_cpu_ptr(&batch_cpus, id);

		spin_lock_init(&cpu->lock);
		timer_setup(&cpu->timer, batch_expired, TIMER_PINNED);
	}
	return 0;
}

/* The hooks are gone; send what waits, while the family still exists. */
void sniffer_batch_stop(void)
{
	int id;

	WRITE_ONCE(batch_stopped, true);
	for_each_possible_cpu(id) {
		struct batch_cpu *cpu = per_cpu_ptr(&batch_cpus, id);

		timer_delete_sync(&cpu->timer);
		spin_lock_bh(&cpu->lock);
		batch_send(cpu);
		spin_unlock_bh(&cpu->lock);
	}
}

/* The family is gone, so nobody can ask for a flush any more. */
void sniffer_batch_exit(void)
{
	int id;

	for_each_possible_cpu(id)
		timer_delete_sync(&per_cpu_ptr(&batch_cpus, id)->timer);
}
