"""Classes of characters, found for a whole batch of texts at once.

Most rows hold nothing unusual. A table from each code point to its classes, one bit each, says in
about a microsecond a row which detectors have anything to look for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# fmt: off
(CONTROL, ZERO_WIDTH, BIDI, BOM, REPLACEMENT, FULL_WIDTH, KANA, HANGUL, CYRILLIC, HAN, TRADITIONAL,
 SIMPLIFIED, GBK_LIKE, LATIN_HIGH, LATIN, DIGIT, ANGLE, BRACKET, QUOTE, BACKTICK, BACKSLASH, AT,
 COLON, AMPERSAND, BRACE) = (1 << place for place in range(25))
# fmt: on
EVERY = (1 << 32) - 1

# Characters that are written otherwise in simplified Chinese. Rarer ones, and those that are both
# (乾, 著, 後 as a name), are left out: one of them in a simplified text is no fault.
_TRADITIONAL = (
    "們個來這國時說為對學會過還沒樣開問實現當經長動無電點線業種應關係將與認題氣華書話語東車見門頭馬"
    "體麼嗎從並發觀聽讓誰請買賣錢銀鐵錯間聞閱陽陰階際隊雖雙難離雲靈靜響預頂頁領頻顏願類飛飯飲館"
    "萬興舉義習鄉亂爭虧億僅價眾優傳傷倫偽傑備債傾償儲兒黨蘭內岡冊寫軍農馮衝決況凍淨準涼減鳳憑"
    "劃劉則剛創別刪劑勁勞勢勵勸區醫單協佔盧滷衛卻廠廳歷厲壓厭參變葉號嘆嚇吳員啟喚噴團園圍圖圓聖"
    "場壞塊堅壇墳壘壯聲殼壺處複夠誇奪奮奧婦媽嬌孫寧寶審憲宮寬賓寢導壽爾塵嘗屆屬層歲島嶺幣帥師帳幫帶"
    "廣莊慶廬庫廟廢張彈強歸錄徹憶憂懷態慘慣懼戀戶撲執擴掃揚擾撫拋搶護報擔擬擁擇擊擋據擠擲損換攝擺搖攜數敵"
    "斷舊曠曉晉曬暫術樸機殺雜權條極構槍楓櫃標棧棟欄樹橋檔夢檢樓橫歐歡殘毆氫漢湯溝淚潑潔濟測渾濃濤潤澀漲"
    "漸漁溫灣濕潰滿濾濱灘瀾滅燈災爐煉爛煩燒燭熱爺狀猶獨獅獄獵獲貓環瓊畫暢瘋療癢皺盞鹽監蓋盤睜矚矯礎"
    "確礙禮禍積稱穩窮竊競筆築簡籌籃糧糾紅約級紀純紗納縱紛紙紋紡紐細織終組絆紹繹結繞繪給絡絕統絹繡"
    "繼續維綿綱網緒綠締緩編緣緞練縮縫纏罷羅罰職聯聰肅腸膚腫脹脅膽勝膠腦臟臉艦艙藝節蘆蘇蘋茲莖薦蕩榮"
    "藥營蕭薩蔣藍虛蟲蝦蝕蟻補襯襲裝褲覺覽觸訂計訊討訓託記許論設訪證評識訴診詞試詩誠誕該詳誤誘誨"
    "誦諸課調談謀謊諒謎謝謠謙講譜貝負貢財責賢敗貨質販貪貧購貯貫貳貴貼費賀資賈賊賭賜賞賠賴賺賽贊贈贏"
    "趕趨躍踐蹤輕軌軟轉輪較載輔輛輩輝輯輸轄邊達遷運進遠違連遲適選遜遞遺遼郵鄭鄧鄰醬釀釋針釣鈔鐘鋼鑰"
    "欽鈞鉤鈕鈴鉛銅銘鏟銳鋒銷鎖鋪鏈錶鍋鍛鍵鏡鑄鑽鎮閃閉闖閒悶闊隨隱韓順須頑顧頓項頌頸顆頰顯顛風颱飄飢餅"
    "餃餓餘駕駐駛駝駱驕驗騙騎騰驚驟鬧魚魯鮮鯨鳥雞鳴鴉鴨鴻鵝鷹鹹麗麥黃齊齒齡龍龜"
    "裡裏週跡麵髮鬍鬆鬱鬥鬢鬚爲綫衆啓牀丟亞兩剋務妝姪寵屍屜帟幃幾廁廈廚彌徑恥悅惡惱愛憊慮慾憐懇戰"
    "戲懸懲懶挾捨採揀揮搗撐撥撈撿擄攏攔攤攪敘斃曆曇朧桿棄棗樁樞樑樂橢櫥櫻毀氈淒淵淺渦湧溼滄滬漬滯"
    "漿潛澆澗澤濁濫瀆瀉瀏瀝瀕瀘煙熾燙爍牆牽牘犧狹狽猙獎獻獸瑤瑣瑪瑩璽瓏產畝畢疇瘡癡癮癱盡盪盜硃碩"
    "磚禪禎稅穀穢穫穎窩窪竄筍箋範簽簾籠籬籲紮紳絃絞絨絲綁綜綢綴綵綺緊緯緻緝縣縷總績繃繩繫繭繳纖纜"
    "罈罵羨聳聶聾脈脣腎膿臍臘臨艱艷荊莢萊萵葷葦蒞蒼蓀蓮蔥蔭蔔薑薔藹藺蘊蘿虜蛻螞螢蟄蠅蠍蠟蠣蠶蠻衊"
    "袞裊製褻襖襤襪襬規視覓親覷詐詛詠詢詣誅誡誣誌誼諂諉諜諧諫諮諷諺諾謁謂謗謬謹譁譏譚譯議譴譽讀讚"
    "讒讖豎豐豬貍貶貿賂賄賑賦賬贓贖贗贛趙蹟躊躑躡軀軋軒軸輓輟輻輾轅轍轎轟辦辭辯迴逕遊遙邇邏鄒醃醜"
    "醞釁釘釦鈍鈣鈉鉀鉑鉗銑銬銹鋁鋤鋸錐錦錨錫錳鍊鍍鍬鎊鎳鏗鏽鐮鐳鑑鑒鑲鑼鑿閂閘閣閥閨闆闌闡陝陣陳"
    "陸險隕隸雋霧霽韌韻頃頒頗頡頹額顎顫顱飪飼飽飾餌餵餡饅饑饒饞馱馳馴馭駁駭騁騷騾驃驅驛驢髒魷鮑鯉"
    "鯊鯽鰓鰭鱉鱗鱷鳶鴕鴛鴦鴿鵑鵬鶯鶴鷗鸚鹵鹼齋齣齦齪龐龔"
)


def _simplified() -> str:
    """Characters of simplified Chinese alone: those of GB 2312 that Big5 does not have."""
    pairs = [bytes((lead, trail)) for lead in range(0xB0, 0xF8) for trail in range(0xA1, 0xFF)]
    chars = "".join(pair.decode("gb2312", "ignore") for pair in pairs)
    return "".join(char for char in chars if not char.encode("big5", "ignore"))


def _gbk_like() -> list[int]:
    """Characters that Chinese UTF-8 turns into when it is read as GBK, and that are rare else: the
    bytes of a common character begin with E4 to E9, and 80 to BF follow."""
    pairs = [(lead, trail) for lead in range(0xE2, 0xF0) for trail in range(0x80, 0xC0)]
    found = [bytes(pair).decode("gbk", "ignore") for pair in pairs if pair[1] != 0x7F]
    return [ord(char) for char in found if len(char) == 1]


def _table() -> np.ndarray:
    table = np.zeros(0x110000, np.uint32)

    def mark(bit: int, *ranges: tuple[int, int]) -> None:
        for first, last in ranges:
            table[first : last + 1] |= np.uint32(bit)

    def mark_each(bit: int, chars: str) -> None:
        table[[ord(char) for char in chars]] |= np.uint32(bit)

    mark(CONTROL, (0, 8), (0x0B, 0x0C), (0x0E, 0x1F), (0x7F, 0x9F), (0x2028, 0x2029))
    mark(ZERO_WIDTH, (0x200B, 0x200D), (0x2060, 0x2064), (0xAD, 0xAD), (0x180E, 0x180E))
    mark(ZERO_WIDTH, (0x34F, 0x34F))
    mark(BIDI, (0x202A, 0x202E), (0x2066, 0x2069), (0x200E, 0x200F), (0x61C, 0x61C))
    mark(BOM, (0xFEFF, 0xFEFF))
    mark(REPLACEMENT, (0xFFFD, 0xFFFD))
    mark(FULL_WIDTH, (0xFF10, 0xFF19), (0xFF21, 0xFF3A), (0xFF41, 0xFF5A))
    mark(KANA, (0x3041, 0x3096), (0x30A1, 0x30FA), (0xFF66, 0xFF6F), (0xFF71, 0xFF9D))
    mark(HANGUL, (0xAC00, 0xD7A3), (0x1100, 0x11FF), (0x3131, 0x318E))
    mark(CYRILLIC, (0x0400, 0x052F))
    mark(HAN, (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x323AF))
    mark(LATIN_HIGH, (0x80, 0xFF), (0x152, 0x153), (0x160, 0x161), (0x178, 0x178), (0x192, 0x192))
    mark_each(LATIN_HIGH, "ŽžˆŸ˜€™‚ƒ„†‡‰‹›")
    mark(LATIN, (0x41, 0x5A), (0x61, 0x7A))
    mark(DIGIT, (0x30, 0x39))
    mark_each(TRADITIONAL, _TRADITIONAL)
    mark_each(SIMPLIFIED, _simplified())
    mark_each(ANGLE, "<＜")
    mark_each(BRACKET, "([{（【《「『〔〈")
    mark_each(QUOTE, '"“”‘')
    mark_each(BACKTICK, "`")
    mark_each(BACKSLASH, "\\")
    mark_each(AT, "@")
    mark_each(COLON, ":：")
    mark_each(AMPERSAND, "&")
    mark_each(BRACE, "{[")
    table[_gbk_like()] |= np.uint32(GBK_LIKE)
    return table


TABLE = _table()


def classes_of(texts: Sequence[str]) -> list[int]:
    """For each text, the classes that occur in it."""
    # A separator keeps empty texts apart; surrogates stay what they are.
    points = np.frombuffer("\n".join([*texts, ""]).encode("utf-32-le", "surrogatepass"), "<u4")
    ends = np.cumsum([len(text) + 1 for text in texts])
    found = np.bitwise_or.reduceat(TABLE[points], np.concatenate([[0], ends[:-1]]))
    return [int(each) for each in found]


def points_of(bit: int) -> str:
    """A class as a character class of a regular expression."""
    places = np.flatnonzero(TABLE & np.uint32(bit))
    edges = np.flatnonzero(np.diff(places) > 1)
    firsts = places[np.concatenate([[0], edges + 1])]
    lasts = places[np.concatenate([edges, [len(places) - 1]])]
    return "".join(
        f"\\U{first:08x}-\\U{last:08x}" for first, last in zip(firsts, lasts, strict=True)
    )
